"""The quantised kernels of a model: which they are, and how they are filled."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lorax_flax import quant
from lorax_flax.adapt.paths import map_with_path
from lorax_flax.errors import prefixed
from lorax_flax.hub.checkpoints import shards
from lorax_flax.hub.checkpoints.entries import kind
from lorax_flax.hub.checkpoints.keymap import KeyMap


def kernels(keymap: KeyMap) -> set[str]:
  """Paths of the body's linear layers and experts: no table, norm, router or head."""
  heads = {path for paths in keymap.heads.values() for path in paths}
  return {
    site.path
    for site in keymap.sites.values()
    if site.entry.part == "body"
    and site.path not in heads
    and (kind(site.entry) == "linear" or "/experts/" in site.path)
  }


def shapes(tree: Any, keymap: KeyMap, name: str | None) -> Any:
  """A tree of ShapeDtypeStructs with its kernels in a format; None leaves it as it is.

  Raises:
    LoraxError: an unknown format; a kernel that it does not take, which is named.
  """
  if name is None:
    return tree
  chosen = kernels(keymap)

  def shape(path, leaf):
    with prefixed(f"quant {name}: {path!r}"):
      return quant.quantize(leaf, name) if path in chosen else leaf

  return map_with_path(shape, tree)


def fill(
  leaf: quant.Quantized, read: Callable[[shards.Block], np.ndarray]
) -> quant.Quantized:
  """A leaf of NumPy arrays, read and quantised one kernel of its stack at a time.

  Args:
    leaf: of ShapeDtypeStructs.
    read: a block of the kernel, all of its axes.
  """
  stack, full = leaf.shape[:-2], shards.full(leaf.shape[-2:])
  places = list(np.ndindex(*stack))

  def quantised(place):
    block = (*((i, i + 1) for i in place), *full)
    return quant.quantize(read(block), quant.name_of(leaf))

  def empty(x):
    return np.empty((*stack, *x.shape[len(stack) :]), x.dtype)

  first = quantised(places[0])
  filled = jax.tree.map(empty, first)
  for place in places:
    made = first if place == places[0] else quantised(place)
    for array, x in zip(jax.tree.leaves(filled), jax.tree.leaves(made), strict=True):
      array[place] = np.asarray(x)[(0,) * len(stack)]
  return filled

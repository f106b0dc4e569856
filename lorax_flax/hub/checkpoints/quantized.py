"""The quantised kernels of a model: which they are, and how they are filled."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from lorax_flax import quant
from lorax_flax.adapt.paths import map_with_path
from lorax_flax.errors import LoraxError, check_known, prefixed
from lorax_flax.hub.checkpoints import shards
from lorax_flax.hub.checkpoints.entries import Site, kind
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.hub.files import safetensors
from lorax_flax.quant.ggml import Ggml

# Bytes of the float32 numbers that are quantised at once.
_BLOCK = 4 << 20
# A place of a stack, outputs of the kernel there, and their weights.
_Part = tuple[tuple[int, ...], Any, quant.Quantized]


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


def formats(
  keymap: KeyMap,
  name: str | None,
  stored: Callable[[str], Mapping[str, str | None]] | None = None,
) -> dict[str, str]:
  """The format of each kernel that is quantised, by path.

  Args:
    name: of `quant.CHOICES`; None: no kernel is.
    stored: path -> the blocks of each of its tensors in a file, by key, or None where
      it is numbers there.

  Raises:
    LoraxError: an unknown name; blocks as they are stored where there is no file, or
      where a kernel's are of no format, or of several.
  """
  if name is None:
    return {}
  check_known("quant", name, quant.CHOICES)
  chosen = kernels(keymap)
  if name != quant.AS_STORED:
    return dict.fromkeys(chosen, name)
  if stored is None:
    raise LoraxError(f"quant {name}: without its file a model has no stored blocks")
  found = {path: _format(path, stored(path)) for path in sorted(chosen)}
  if not any(found.values()):
    raise LoraxError(f"quant {name}: the checkpoint has no quantised kernel")
  return {path: each for path, each in found.items() if each is not None}


def _format(path: str, blocks: Mapping[str, str | None]) -> str | None:
  """The format of a kernel as it is stored; None: it is numbers."""
  if len({*blocks.values()}) > 1:
    names = ", ".join(f"{key} is {each or 'numbers'}" for key, each in blocks.items())
    raise LoraxError(
      f"quant {quant.AS_STORED}: {path!r} is one kernel of several tensors, and"
      f" {names}: scan=False keeps layers apart"
    )
  found = next(iter(blocks.values()))
  if found is not None:
    known = [name for name, each in quant.FORMATS.items() if issubclass(each, Ggml)]
    with prefixed(f"quant {quant.AS_STORED}: {path!r}"):
      check_known("format", found, known)
  return found


def shapes(tree: Any, formats: Mapping[str, str]) -> Any:
  """A tree of ShapeDtypeStructs with its kernels in their formats, by path.

  Raises:
    LoraxError: a kernel that its format does not take, which is named.
  """

  def shape(path, leaf):
    if path not in formats:
      return leaf
    with prefixed(f"quant {formats[path]}: {path!r}"):
      return quant.quantize(leaf, formats[path])

  return map_with_path(shape, tree)


def fill(
  leaf: quant.Quantized, read: Callable[[shards.Block], np.ndarray]
) -> quant.Quantized:
  """A leaf of NumPy arrays, read and quantised some outputs of a kernel at a time.

  Args:
    leaf: of ShapeDtypeStructs.
    read: a block of the kernel, all of its axes.
  """
  kind, (*stack, fan_in, fan_out) = type(leaf), leaf.shape
  rows = kind.by_rows().struct((fan_in, fan_out), leaf.dtype)
  name, count = quant.name_of(rows), max(1, _BLOCK // (4 * fan_in))

  def quantised(place: tuple[int, ...], first: int) -> _Part:
    outputs = first, min(first + count, fan_out)
    block = (*((i, i + 1) for i in place), (0, fan_in), outputs)
    numbers = read(block).reshape(fan_in, -1)
    return (), slice(*outputs), quant.quantize(numbers, name)

  def kernel(place: tuple[int, ...]) -> _Part:
    parts = (quantised(place, first) for first in range(0, fan_out, count))
    return place, slice(None), _from_rows(_filled(rows, parts), kind=kind)

  return _filled(leaf, (kernel(place) for place in np.ndindex(*stack)))


@functools.partial(jax.jit, static_argnames="kind")
def _from_rows(rows: quant.Quantized, kind: type[quant.Quantized]) -> quant.Quantized:
  return kind.from_rows(rows)


def fill_stored(
  leaf: Ggml, reader: safetensors.Reader, keys: Mapping[str, Site], dtype: Any
) -> quant.Quantized:
  """A leaf of NumPy arrays, of the blocks of its tensors as they are stored.

  Args:
    leaf: of ShapeDtypeStructs.
    keys: stored keys of its tensors, with their sites.
    dtype: of the dense kernel.
  """

  def part(key: str, site: Site) -> _Part:
    # The last axis of a kernel is the rows' of its arrays.
    place, depth = site.place(leaf.shape), len(leaf.shape) - 2
    rows = place[-1] if len(place) > depth + 1 else slice(None)
    return site.index, rows, type(leaf).of_rows(reader.rows(key), dtype)

  return _filled(leaf, (part(key, site) for key, site in keys.items()))


def _filled(leaf: quant.Quantized, parts: Iterator[_Part]) -> quant.Quantized:
  """A leaf of NumPy arrays, made of parts."""
  filled: quant.Quantized | None = None
  for place, outputs, part in parts:
    if filled is None:
      dtypes = {name: x.dtype for name, x in part.arrays().items()}
      made: dict[str, Any] = {
        name: safetensors.empty(x.shape, dtypes[name])
        for name, x in leaf.arrays().items()
      }
      filled = replace(part, **made)
    for name, array in filled.arrays().items():
      cuts = (outputs if axis == "out" else slice(None) for axis in leaf.axes[name])
      array[*place, *cuts] = part.arrays()[name]
  assert filled is not None  # A kernel has tensors.
  return filled

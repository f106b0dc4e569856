"""Plain LoRAs: the common form of files that hold two factors for each module.

A form of another tool is one file beside this one, which translates names, axes and
metadata between its files and `Plain`, and one row of `any.PLAIN`. Adapters themselves
are built and taken apart by `loralib`, whose names `Plain` has.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from lorax_flax.adapt import stacking
from lorax_flax.errors import LoraxError, listing
from lorax_flax.hub.adapters import loralib
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.methods import Adapter, LoRA


class Plain(NamedTuple):
  """Factors of some modules.

  Attributes:
    tensors: "MODULE.lora_A" (rank, in) and "MODULE.lora_B" (out, rank), with the names
      of modules that transformers has.
    alpha: of all modules, each scaled by alpha / its rank.
  """

  tensors: Mapping[str, np.ndarray]
  alpha: float


class Base(NamedTuple):
  """The base, as far as a form depends on it.

  Attributes:
    keymap: of the base.
    heads: fields of its config.json with numbers of heads.
    tied: in its own files one table is the token embeddings and the head.
  """

  keymap: KeyMap
  heads: Mapping[str, int]
  tied: bool = False


class Form(Protocol):
  """The module of a form."""

  # The tool that reads it, the file of a folder that we write, whether it says alpha.
  TOOL: str
  FILE: str
  HAS_ALPHA: bool

  def is_adapter(self, source: Path) -> bool:
    """Checks whether a file or folder has this form."""

  def read(
    self, source: Path, base: Base
  ) -> tuple[Mapping[str, np.ndarray], float | None]:
    """Reads a file, or the one of a folder; LoraxError where it is damaged.

    Returns:
      `Plain`'s tensors, and its alpha, where the file says it.
    """

  def write(self, folder: Path, plain: Plain, base: Base) -> None:
    """Writes a new folder; LoraxError for a module that the tool has no place for."""


def of_adapter(adapter: Adapter, keymap: KeyMap, tool: str) -> Plain:
  """The factors of an adapter, with one alpha: the most common, the others folded in.

  Raises:
    LoraxError: a delta that is not the two factors of a linear layer or an embedding.
  """
  for path, delta in adapter.items():
    if type(delta) is not LoRA:
      raise LoraxError(
        f"{tool} applies the two factors of LoRA alone, and {path} has a"
        f" {type(delta).__name__} (no DoRA, biases, other methods, or weights trained"
        " in full). Merge the adapter instead (experiments.merge)"
      )
  return Plain(*loralib.to_state_dict(adapter, keymap))


def paired(
  tensors: Mapping[str, np.ndarray], ends: Mapping[str, str], tool: str
) -> dict[str, dict[str, np.ndarray]]:
  """The two factors of each module, {"A": …, "B": …}, both matrices.

  Args:
    tensors: of a file.
    ends: of the names of a file's tensors, and "A" or "B".

  Raises:
    LoraxError: another tensor, no matrix, or one factor without the other.
  """
  found: dict[str, dict[str, np.ndarray]] = {}
  for name, value in tensors.items():
    end = next((end for end in ends if name.endswith(end)), None)
    if end is None or value.ndim != 2:
      raise LoraxError(
        f"{name!r} {value.shape} is no factor of a LoRA: of {tool}'s tensors, matrices"
        f" that end in {listing(map(repr, ends))} are read"
      )
    found.setdefault(name.removesuffix(end), {})[ends[end]] = value
  for module, pair in found.items():
    if len(pair) == 1:
      raise LoraxError(f"{module} has one factor alone, {next(iter(pair))}")
  return found


def only_rank(plain: Plain, tool: str) -> int:
  """The rank that all modules have; modules that differ: LoraxError."""
  ranks = {
    name.removesuffix(".lora_A"): len(value)
    for name, value in plain.tensors.items()
    if name.endswith(".lora_A")
  }
  rank = stacking.most_common(ranks)
  other = {f"{name} ({n})" for name, n in ranks.items() if n != rank}
  if other:
    raise LoraxError(
      f"{tool} has one rank for all modules. Most have {rank}, but not"
      f" {listing(other, most=6)}"
    )
  return rank


_LAYER = re.compile(r"(.*\.)?(\d+)\.(.+)")


def by_layer(modules: Mapping[str, object]) -> tuple[dict[int, set[str]], set[str]]:
  """Modules of each layer, by their names in it, and those outside of all layers."""
  layers: dict[int, set[str]] = {}
  outside = set()
  for name in modules:
    if match := _LAYER.fullmatch(name):
      layers.setdefault(int(match[2]), set()).add(match[3])
    else:
      outside.add(name)
  return layers, outside

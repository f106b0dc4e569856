"""Orbax checkpoints with the trees of other JAX libraries, whose kernels are einsums'.

A factor has the axes of its kernel: of (in, heads, features) A is (in, rank) and B
(rank, heads, features). A kernel of several modules side by side has one A for all, and
B (rank, modules, …). All kernels have one rank and one factor of A @ B.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from lorax_flax.errors import LoraxError, check_known, prefixed
from lorax_flax.hub.adapters.plain import Base, Plain, paired

_TREE = "_METADATA"  # orbax's file with the names of a checkpoint's leaves


class Kernel(NamedTuple):
  """A kernel of a tree.

  Attributes:
    modules: names that transformers has for its parts.
    heads_in, heads_out: fields of config.json, where an axis is heads by features.
  """

  modules: tuple[str, ...]
  heads_in: str | None = None
  heads_out: str | None = None


class Form(NamedTuple):
  """Names in the trees of a tool.

  Attributes:
    tool: its name.
    a, b: ends of the names of factors.
    kernels: by the rest of the names.
  """

  tool: str
  a: str
  b: str
  kernels: Mapping[str, Kernel]


def in_layers(
  layer: str, kernels: Mapping[str, Kernel], base: Base
) -> dict[str, Kernel]:
  """The kernels of all layers, {i} of `layer` being the number of one."""
  return {
    f"{layer.format(i=i)}/{name}": kernel._replace(
      modules=tuple(f"model.layers.{i}.{module}" for module in kernel.modules)
    )
    for i in range(base.keymap.counts["i"])
    for name, kernel in kernels.items()
  }


def leaves(folder: Path) -> dict[str, Any]:
  """Metadata of the leaves of a checkpoint, by "a/b/c"; empty where there is none."""
  if not (folder / _TREE).is_file():
    return {}
  with prefixed(str(folder), Exception):  # of any kind where the file is damaged
    found = ocp.PyTreeCheckpointHandler().metadata(folder.absolute())
    return flatten_dict(found.tree, sep="/")


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """The tree of leaves by "a/b/c"."""
  return unflatten_dict(leaves, sep="/")


def read(folder: Path, form: Form) -> dict[str, np.ndarray]:
  """`Plain`'s tensors of the factors in a checkpoint; other leaves stay on disk.

  Raises:
    LoraxError: a damaged checkpoint, an unknown kernel, or factors that are no LoRA.
  """
  ends = {form.a: "A", form.b: "B"}
  found = {name: x for name, x in leaves(folder).items() if name.endswith((*ends,))}
  numpy = dict.fromkeys(found, ocp.RestoreArgs(restore_type=np.ndarray))
  with prefixed(str(folder), Exception), ocp.PyTreeCheckpointer() as checkpointer:
    args = ocp.args.PyTreeRestore(
      item=nested(found), restore_args=nested(numpy), partial_restore=True
    )
    tree = checkpointer.restore(folder.absolute(), args=args)
    matrices = {
      name: x.reshape((-1, x.shape[-1]) if name.endswith(form.a) else (len(x), -1))
      for name, x in flatten_dict(tree, sep="/").items()
    }
  tensors: dict[str, np.ndarray] = {}
  for name, pair in paired(matrices, ends, form.tool).items():
    check_known(f"{form.tool} kernel", name, form.kernels)
    a, b, modules = pair["A"], pair["B"], form.kernels[name].modules
    if a.shape[1] != len(b) or b.shape[1] % len(modules):
      raise LoraxError(f"{name} has factors {a.shape} and {b.shape}, which are no LoRA")
    for module, part in zip(modules, np.split(b, len(modules), axis=1), strict=True):
      tensors |= {f"{module}.lora_A": a.T, f"{module}.lora_B": part.T}
  return tensors


def of_plain(
  plain: Plain, form: Form, heads: Mapping[str, int], scale: float | None = None
) -> dict[str, np.ndarray]:
  """The leaves of a tool's tree, float32, all of the largest rank.

  Args:
    heads: fields of config.json with numbers of heads.
    scale: the tool's factor of A @ B; None: `plain.alpha` / rank.

  Raises:
    LoraxError: a module that is in no kernel.
  """
  factors: dict[str, dict[str, np.ndarray]] = {}
  for key, value in plain.tensors.items():
    module, _, factor = key.rpartition(".")
    factors.setdefault(module, {})[factor] = value
  names = {m: name for name, kernel in form.kernels.items() for m in kernel.modules}
  for module in factors:
    check_known(f"module of {form.tool}'s LoRA", module, names)
  used = {names[module] for module in factors}
  groups = {
    name: [factors.get(module) for module in kernel.modules]
    for name, kernel in form.kernels.items()
    if name in used
  }
  rank = max(sum(map(len, _distinct(group))) for group in groups.values())
  over_rank = plain.alpha / (plain.alpha / rank if scale is None else scale)
  leaves: dict[str, np.ndarray] = {}
  for name, group in groups.items():
    kernel = form.kernels[name]
    a, b = _side_by_side(group, rank, over_rank)
    leaves[name + form.a] = _by_heads(a, 0, heads.get(kernel.heads_in or ""))
    b = _by_heads(b, 2, heads.get(kernel.heads_out or ""))
    leaves[name + form.b] = b if len(group) > 1 else b[:, 0]
  return leaves


_Group = list[dict[str, np.ndarray] | None]


def _distinct(group: _Group) -> list[np.ndarray]:
  """The lora_A of a kernel's modules; one of them where all are equal."""
  found = [pair["lora_A"] for pair in group if pair]
  same = all(np.array_equal(found[0], each) for each in found)
  return found[:1] if same else found


def _side_by_side(
  group: _Group, rank: int, over_rank: float
) -> tuple[np.ndarray, np.ndarray]:
  """A (in, rank) and B (rank, modules, out) of a kernel, zeros where it has none.

  Args:
    over_rank: what lora_B is multiplied by, times the module's own rank.
  """
  distinct = _distinct(group)
  stacked = np.concatenate(distinct)
  a = np.zeros((stacked.shape[1], rank), np.float32)
  a[:, : len(stacked)] = stacked.T
  width = max(len(pair["lora_B"]) for pair in group if pair)
  b = np.zeros((rank, len(group), width), np.float32)
  start = 0
  for i, pair in enumerate(group):
    if pair:
      own = pair["lora_B"].shape[1]
      b[start : start + own, i] = np.float32(over_rank / own) * pair["lora_B"].T
      start += own if len(distinct) > 1 else 0
  return a, b


def _by_heads(x: np.ndarray, axis: int, heads: int | None) -> np.ndarray:
  if heads is None:
    return x
  return x.reshape(*x.shape[:axis], heads, -1, *x.shape[axis + 1 :])

"""The weights of a model as an orbax checkpoint of its params tree."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint import type_handlers

from lorax_flax.hub.checkpoints import export
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.quant import Deferred

FOLDER = "params"


class _OneByOne(type_handlers.NumpyHandler):
  """Deferred leaves as NumPy arrays, each of them written before the next is made."""

  async def serialize(
    self, values: Sequence[Any], infos: Sequence[Any], args: Any = None
  ) -> list[Any]:
    for i, value in enumerate(values):
      rest = None if args is None else [args[i]]
      for written in await super().serialize([np.asarray(value)], [infos[i]], rest):
        written.result()
    return []


def write(folder: Path, leaves: Mapping[str, Any], keymap: KeyMap) -> None:
  """Writes params/, the tree of NumPy arrays that orbax alone restores.

  Args:
    leaves: by path. They are made, checked and written one at a time.

  Raises:
    LoraxError: a number that is not finite; it names the leaf.
  """
  del keymap

  def defer(path: str, leaf: Any) -> Deferred:
    def make() -> np.ndarray:
      ((_, value),) = export.finite({path: leaf})
      return value

    return Deferred(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), make)

  deferred = {tuple(p.split("/")): defer(p, leaf) for p, leaf in leaves.items()}
  registry = type_handlers.create_type_handler_registry((Deferred, _OneByOne()))
  handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
  with ocp.Checkpointer(handler) as checkpointer:
    tree = traverse_util.unflatten_dict(deferred)
    checkpointer.save((folder / FOLDER).absolute(), args=ocp.args.PyTreeSave(tree))

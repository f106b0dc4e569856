"""Pruned ranks: a folder's tensors lack their rows, where ours have zeros."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lorax_flax.adapt import stacking
from lorax_flax.errors import LoraxError
from lorax_flax.hub.checkpoints.entries import Site
from lorax_flax.hub.peft.config import CONFIG_FILE, PeftConfig
from lorax_flax.hub.peft.forms import form_of
from lorax_flax.hub.peft.layout import Slot
from lorax_flax.hub.peft.tensors import Tensors
from lorax_flax.methods import Delta
from lorax_flax.methods.axes import by_role, resolved


class Rows(NamedTuple):
  """The rows of a tensor that a folder has.

  Attributes:
    axis: the stored one, of the rank.
    kept: a bool for each row.
  """

  axis: int
  kept: np.ndarray

  def shape(self, stored: Sequence[int]) -> tuple[int, ...]:
    """The shape of the tensor with all of its rows."""
    return (*stored[: self.axis], len(self.kept), *stored[self.axis + 1 :])


def rows(config: PeftConfig, slots: Mapping[str, Slot]) -> dict[str, Rows]:
  """The rows of each tensor of a folder some of whose ranks are pruned, by key.

  Raises:
    LoraxError: the config says so of another number of rows than the rank.
  """
  end, found = form_of(config.peft_type).pruned_by, {}
  for key, slot in slots.items():
    kept = config.kept_ranks.get(f"{slot.module}.{end}")
    if kept is None or slot.method is None or "rank" not in slot.method.axes[slot.leaf]:
      continue
    if len(kept) != config.r:
      raise LoraxError(
        f"{CONFIG_FILE}: rank_pattern has {len(kept)} rows for {slot.module}, whose"
        f" rank is {config.r}"
      )
    axes = resolved(slot.method.axes[slot.leaf], by_role(slot.roles))
    axis = axes.index("rank")
    axis = axis if slot.form.axes is None else slot.form.axes[axis]
    axis += sum(one <= axis for one in slot.form.ones)
    found[key] = Rows(axis, np.array(kept))
  return found


def expanded(tensors: Tensors, rows: Mapping[str, Rows]) -> Tensors:
  """A folder's tensors, with zeros in the rows that it lacks."""

  def get(key: str) -> np.ndarray:
    stored = tensors.get(key)
    if key not in rows or stored.shape[rows[key].axis] != rows[key].kept.sum():
      return stored
    axis, kept = rows[key]
    full = np.zeros(rows[key].shape(stored.shape), stored.dtype)
    full[(slice(None),) * axis + (kept,)] = stored
    return full

  shapes = {
    key: rows[key].shape(shape)
    if key in rows and shape[rows[key].axis] == rows[key].kept.sum()
    else shape
    for key, shape in tensors.shapes.items()
  }
  return replace(tensors, shapes=shapes, get=get)


def cut(
  tensors: Mapping[str, np.ndarray], rows: Mapping[str, Rows]
) -> dict[str, np.ndarray]:
  """Tensors less the rows that a folder lacks."""
  return {
    key: np.compress(rows[key].kept, x, rows[key].axis) if key in rows else x
    for key, x in tensors.items()
  }


def kept_ranks(
  sites: Mapping[str, tuple[Delta, Site]], end: str
) -> dict[str, tuple[bool, ...]]:
  """`PeftConfig.kept_ranks` of deltas; empty where no rank is pruned.

  Args:
    sites: a delta and the place in it, by PEFT's name of the module.
    end: of the names.
  """
  found = {}
  for name, (delta, site) in sites.items():
    assert delta.peft is not None
    leaf = delta.peft.keys["linear"][end][0]
    values = np.asarray(delta.leaves()[leaf])[stacking.place_of(delta, site.index)]
    found[f"{name}.{end}"] = tuple((values != 0).tolist())
  every = [kept for each in found.values() for kept in each]
  return found if any(every) and not all(every) else {}

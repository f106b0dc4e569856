"""What a PEFT folder asks of the base that it is read onto."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lorax_flax.hub.checkpoints import keymap as km
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.hub.peft.config import PeftConfig
from lorax_flax.hub.peft.layout import PREFIX, Slot, Tied, layout
from lorax_flax.hub.peft.tensors import Tensors
from lorax_flax.methods import Tuned


@dataclass(frozen=True)
class Needs:
  """What an adapter asks of its base.

  Attributes:
    num_labels: of the head that it brings; None: it brings none.
    untie: each use of a tied weight must have a weight of its own.
  """

  num_labels: int | None = None
  untie: bool = False


def find(tensors: Tensors, config: PeftConfig, keymap: KeyMap) -> Needs:
  """The needs of a folder.

  Args:
    keymap: of the base as it is, for the config's task.
  """
  shapes = {key.removeprefix(PREFIX): shape for key, shape in tensors.shapes.items()}
  return Needs(km.num_labels(keymap, shapes), _apart(tensors, config, keymap))


def _apart(tensors: Tensors, config: PeftConfig, keymap: KeyMap) -> bool:
  """True where the uses of a tied weight are trained apart."""
  if not keymap.ties or config.ensure_weight_tying:
    return False
  try:
    slots = layout(config, keymap)
  except Tied:
    return True
  return any(
    slot.status == "copy"
    and slot.method is Tuned
    and _differs(key, slot, slots, tensors)
    for key, slot in slots.items()
  )


def _differs(key: str, copy: Slot, slots: Mapping[str, Slot], tensors: Tensors) -> bool:
  """True where a copy is not what the other key of its leaf holds."""
  mains = (k for k, s in slots.items() if s.path == copy.path and s.status == "own")
  main = next(mains, None)
  if main is None or not {key, main} <= tensors.shapes.keys():
    return False
  return not np.array_equal(tensors.get(key), tensors.get(main))

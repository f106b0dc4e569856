"""Requirements of a PEFT folder for the base that it is read onto."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorax_flax.hub.checkpoints import keymap as km
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.hub.peft.config import PeftConfig
from lorax_flax.hub.peft.forms import soft_form_of
from lorax_flax.hub.peft.layout import WRAPPERS, Slot, Tied, layout, prefix
from lorax_flax.hub.peft.modules import HEAD, places
from lorax_flax.hub.peft.tensors import Tensors
from lorax_flax.methods import Tuned


@dataclass(frozen=True)
class Needs:
  """Requirements of an adapter for its base.

  Attributes:
    num_labels: of the head that it brings; None: it brings none.
    untie: each use of a tied weight must have a weight of its own.
    vocab_size: number of rows of the tables that it brings; None: it brings none.
    scan: its deltas are of stacked layers.
    soft: fields of `lorax_flax.models.soft.SoftSettings`, where it has trained states
      beside the base's weights.
  """

  num_labels: int | None = None
  untie: bool = False
  vocab_size: int | None = None
  scan: bool = False
  soft: Mapping[str, Any] | None = None


def find(tensors: Tensors, config: PeftConfig, keymap: KeyMap) -> Needs:
  """The needs of a folder.

  Args:
    keymap: of the base as it is, for the config's task.
  """
  start, form = prefix(config), soft_form_of(config)
  shapes = {key.removeprefix(start): shape for key, shape in tensors.shapes.items()}
  try:
    apart = _differ(tensors, layout(config, keymap))
  except Tied:
    apart = True
  # What PEFT ties cannot be had of two weights.
  ties = config.ties_targets() or config.ties_saved()
  tokens = config.ensure_weight_tying and config.trainable_token_indices is not None
  untie = apart and not ties and not tokens
  soft = None if form is None else form.needs(config.options)
  return Needs(km.num_labels(keymap, shapes), untie, _rows(shapes, keymap), soft=soft)


def _differ(tensors: Tensors, slots: Mapping[str, Slot]) -> bool:
  """True where the copies of a table that is trained in full are not equal."""
  copies = {k: s for k, s in slots.items() if s.status == "copy" and s.method is Tuned}
  for key, copy in copies.items():
    mains = (k for k, s in slots.items() if s.path == copy.path and s.status == "own")
    there = (main for main in mains if {key, main} <= tensors.shapes.keys())
    if not all(np.array_equal(tensors.get(key), tensors.get(main)) for main in there):
      return True
  return False


def _rows(shapes: Mapping[str, tuple[int, ...]], keymap: KeyMap) -> int | None:
  """The number of rows of the tables of tokens, by any of PEFT's copies of them."""
  found = places(keymap)
  embeddings = [name for name, place in found.items() if place.kind == "embedding"]
  names = [
    name
    for name, place in found.items()
    if name in (*embeddings[:1], HEAD) or place.main in embeddings[:1]
  ]
  for name in names:
    for wrapper in WRAPPERS:
      if shape := shapes.get(f"{name}.{wrapper}weight"):
        return shape[0]
  return None

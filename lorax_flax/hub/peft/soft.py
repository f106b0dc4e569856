"""PEFT's folders of trained states before the tokens: prefixes and prompts.

Such a folder has one tensor, whatever the model, and the modules that are saved in full
(facts from peft 0.21: utils/save_and_load.py, config.py, peft_model.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorax_flax.errors import LoraxError, listing
from lorax_flax.hub.checkpoints.entries import Entry, Site
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.methods import Adapter, Tuned
from lorax_flax.methods.peft_form import Form, PeftForm

KEY = "prompt_embeddings"
# PEFT wraps no module for these types.
PREFIX = "base_model."
_LENGTH, _STACKS = "num_virtual_tokens", "num_transformer_submodules"
_SIZES = {
  name: name for name in (_LENGTH, "token_dim", "num_layers", "num_attention_heads")
}
_NO_TARGETS = (
  "target_modules",
  "exclude_modules",
  "layers_to_transform",
  "layers_pattern",
)


@dataclass(frozen=True)
class Flat(Form):
  """A stored matrix (tokens, everything else) of our array.

  Attributes:
    sizes: of the matrix's axes, written out in its order.
    stacks: number of the model's stacks of layers for which the matrix has tokens. Of
      an encoder and a decoder, PEFT puts those of the encoder alone before a text.
  """

  sizes: tuple[int, ...] = ()
  stacks: int = 1

  def to_ours(self, stored: np.ndarray) -> np.ndarray:
    return super().to_ours(stored[: self.sizes[0]].reshape(self.sizes))

  def stored_shape(self, ours: Sequence[int]) -> tuple[int, ...]:
    first, *rest = super().stored_shape(ours)
    return self.stacks * first, math.prod(rest)


@dataclass(frozen=True)
class SoftForm:
  """One type of folder.

  Attributes:
    peft: the fields of its config.
    method: soft.method, our name of the type.
    path: of our leaf.
    axes: the axis, of the matrix written out, that each of ours is; None: as they are.
  """

  peft: PeftForm
  method: str
  path: str
  axes: tuple[int, ...] | None = None

  @property
  def site(self) -> Site:
    """The place of the tensor."""
    return Site(self.path, (), Entry(self.path, KEY))

  def form(self, options: Mapping[str, Any]) -> Flat:
    """The form of the tensor, by the config's sizes; LoraxError where one lacks."""
    needed = tuple(_SIZES) if self.axes else (_LENGTH, "token_dim")
    for name in needed:
      if not isinstance(options.get(name), int) or options[name] < 1:
        raise LoraxError(f"{name}={options.get(name)!r} is not what PEFT writes")
    length, width = options[_LENGTH], options["token_dim"]
    if self.axes is None:
      stacks = options.get(_STACKS) or 1
      if stacks not in (1, 2):
        raise LoraxError(f"{_STACKS}={stacks!r} is not what PEFT writes")
      return Flat(sizes=(length, width), stacks=stacks)
    heads = options["num_attention_heads"]
    sizes = (length, options["num_layers"], 2, heads, width // heads)
    return Flat(self.axes, sizes=sizes)

  def needs(self, options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `SoftSettings` of a folder, by the config's sizes."""
    return {"method": self.method, "length": self.form(options).sizes[0]}

  def options(self, shape: Sequence[int]) -> dict[str, int | None]:
    """The config's sizes, by the shape of our leaf."""
    if self.axes is None:
      known = {_LENGTH: shape[0], "token_dim": shape[1], _STACKS: 1}
      return dict.fromkeys(_SIZES) | known
    layers, _, length, heads, size = shape
    return {
      _LENGTH: length,
      "token_dim": heads * size,
      "num_layers": layers,
      "num_attention_heads": heads,
    }


def _fields(peft_type: str, **fields: Any) -> PeftForm:
  return PeftForm(type=peft_type, lacks=_NO_TARGETS, **fields)


FORMS: Mapping[str, SoftForm] = {
  "PREFIX_TUNING": SoftForm(
    # With a projection the tensor is what it gives, which is all that is computed.
    _fields(
      "PREFIX_TUNING",
      options=_SIZES,
      off={_STACKS: (1, None)},
      training={
        "prefix_projection": False,
        "encoder_hidden_size": None,
        "init_weights": None,
      },
    ),
    method="prefix",
    path="prefix/states",
    axes=(1, 2, 0, 3, 4),
  ),
  "PROMPT_TUNING": SoftForm(
    _fields(
      "PROMPT_TUNING",
      options=_SIZES | {_STACKS: _STACKS},
      training={
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        "tokenizer_kwargs": None,
      },
    ),
    method="prompt",
    path="prompt/embedding",
  ),
}


def beside(adapter: Adapter, keymap: KeyMap) -> list[str]:
  """The paths of states that are no weights of the base."""
  return [path for path in adapter if path not in keymap.keys]


def of_adapter(adapter: Adapter, keymap: KeyMap) -> SoftForm | None:
  """The form of an adapter's states beside the base's weights; None: it has none.

  Raises:
    LoraxError: states that PEFT has no form for, or deltas in the same adapter.
  """
  paths = beside(adapter, keymap)
  if not paths:
    return None
  found = [form for form in FORMS.values() if paths == [form.path]]
  if not found:
    raise LoraxError(
      f"PEFT has no form for {listing(paths, most=4)}: write the adapter in our own"
    )
  if others := [p for p, delta in adapter.items() if not isinstance(delta, Tuned)]:
    raise LoraxError(
      f"PEFT has no adapter of {found[0].peft.type} and other deltas in one, and here "
      f"are {listing(others, most=4)} too: write it in our own form"
    )
  return found[0]


def has_form(adapter: Adapter, keymap: KeyMap) -> bool:
  """True where PEFT has a folder for states beside the weights and the rest: a head."""
  heads = {path for paths in keymap.heads.values() for path in paths}
  paths = beside(adapter, keymap)
  known = any(paths == [form.path] for form in FORMS.values())
  needed = keymap.label_paths | {*paths}
  return known and needed <= adapter.keys() <= heads | {*paths}

"""Which tensors a PEFT folder has, for a config and a model.

Reading and writing both follow `layout`, so neither knows a key that the other doesn't.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from lorax_flax.errors import LoraxError, listing, nearest
from lorax_flax.hub import peft_config
from lorax_flax.hub.keymap import (
  KeyMap,
  bare_key,
  full_key,
  leaves_under,
  module_of,
  module_to_path,
  modules,
)
from lorax_flax.hub.peft_config import PeftConfig
from lorax_flax.hub.rows import LINEAR

PREFIX = "base_model.model."

Part = Literal["a", "b", "saved", "bias", "original"]

_FACTOR_KEYS = {
  "linear": ("lora_A.weight", "lora_B.weight"),
  "embedding": ("lora_embedding_A", "lora_embedding_B"),
}


@dataclass(frozen=True)
class Slot:
  """What one tensor of a folder is.

  Attributes:
    path: our leaf path.
    layer: index on the leaf's leading layer axis where layers are scanned, else None.
    part: a factor; a leaf trained in full, with its module ("saved") or as a bias; or
      the base's own leaf.
    reverse: the tensor's axes are those of our array (one layer of it), reversed.
    module: PEFT's name of the module that the config speaks of.
    repeated: PEFT writes here what other tensors or the base say; passed over.
  """

  path: str
  layer: int | None
  part: Part
  reverse: bool
  module: str
  repeated: bool = False


def layout(config: PeftConfig, keymap: KeyMap) -> dict[str, Slot]:
  """Every key of the folder of `config`, and what its tensor is.

  Raises:
    LoraxError: a target that this model doesn't have, or that is no linear layer or
      embedding; a module to save that it doesn't have.
  """
  kinds = modules(keymap)
  targets = config.targets(_all_linear(config, keymap), module_names(keymap))
  if not targets:
    raise LoraxError(peft_config.describe_unknown_target(config, kinds))
  slots: dict[str, Slot] = {}
  for module in targets:
    kind = kinds.get(module, "container")
    if kind not in _FACTOR_KEYS:
      raise LoraxError(
        f"target_modules name {module}, which is no linear layer and no embedding, "
        f"but a {kind}"
      )
    path, layer = module_to_path(keymap, module)
    key_a, key_b = _FACTOR_KEYS[kind]
    slots[f"{module}.{key_a}"] = Slot(path, layer, "a", True, module)
    slots[f"{module}.{key_b}"] = Slot(path, layer, "b", True, module)
  slots |= _saved(config, keymap)
  slots |= _biases(config, keymap, targets, slots)
  return {PREFIX + key: slot for key, slot in slots.items()}


def module_names(keymap: KeyMap) -> list[str]:
  """Full names of all modules, those that only hold others at the end."""
  names = list(modules(keymap))
  for name in list(names):
    while name := name.rpartition(".")[0]:
      names.append(name)
  return list(dict.fromkeys(names))


def can_hold_factors(keymap: KeyMap, module: str) -> bool:
  """Whether PEFT has a LoRA form for the module: a linear layer or an embedding."""
  return modules(keymap).get(module) in _FACTOR_KEYS


def transposed(keymap: KeyMap, key: str) -> bool:
  """Whether the tensor of a full checkpoint key is our leaf, transposed."""
  return keymap.sites[bare_key(keymap, key)].entry.axes == LINEAR


def _all_linear(config: PeftConfig, keymap: KeyMap) -> list[str]:
  """What "all-linear" means: for a sequence classifier, without its head."""
  linear = (name for name, kind in modules(keymap).items() if kind == "linear")
  if config.task_type != peft_config.SEQ_CLS:
    return list(linear)
  # By PEFT's names of heads; a layer before the classifier that's called otherwise
  # (DeBERTa's pooler) is one of the layers.
  heads = peft_config.HEAD_NAMES
  return [name for name in linear if name.split(".")[0] not in heads]


def _saved(config: PeftConfig, keymap: KeyMap) -> dict[str, Slot]:
  """Slots of modules_to_save."""
  names = module_names(keymap)
  _check_saved(config, names)
  slots = {}
  for module in config.saved(names):
    for key, (path, layer) in leaves_under(keymap, module).items():
      slots[key] = Slot(path, layer, "saved", transposed(keymap, key), module)
      if config.bias == "all" and key.endswith(".bias"):
        slots |= _wrapped_biases(key.removeprefix(f"{module}."), slots[key])
  return slots


def _wrapped_biases(inner: str, slot: Slot) -> dict[str, Slot]:
  """What bias="all" adds for a bias of a saved module.

  PEFT takes every key that ends with ".bias", so those inside its own wrapper too;
  then it takes the adapter's name, "default", off where that is next to last.
  """
  name = "" if inner == "bias" else "default."
  wrapped: dict[str, Part] = {
    f"modules_to_save.{name}{inner}": "saved",
    f"original_module.{inner}": "original",
  }
  return {
    f"{slot.module}.{key}": Slot(slot.path, slot.layer, part, False, slot.module, True)
    for key, part in wrapped.items()
  }


def _check_saved(config: PeftConfig, names: Iterable[str]) -> None:
  for end in config.modules_to_save or ():
    # PEFT lists both names that a head may have; a model has one of them.
    if end in peft_config.HEAD_NAMES or any(name.endswith(end) for name in names):
      continue
    near = nearest(end, {name.rpartition(".")[2] for name in names})
    raise LoraxError(
      f"modules_to_save names {end!r}, and this model has no such module; nearest: "
      f"{listing(near) or 'none'}"
    )


def _biases(
  config: PeftConfig, keymap: KeyMap, targets: list[str], saved: Mapping[str, Slot]
) -> dict[str, Slot]:
  """Slots of the biases that `config.bias` trains."""
  slots: dict[str, Slot] = {}
  if config.bias == "none":
    return slots
  is_target = set(targets).__contains__
  for bare, site in keymap.sites.items():
    key = full_key(keymap, bare)
    module = module_of(key)
    if not key.endswith(".bias") or key in saved:
      continue
    if is_target(module):
      # PEFT wraps a target: its own weights move under base_layer.
      key = f"{module}.base_layer.bias"
    elif config.bias == "lora_only":
      continue
    slots[key] = Slot(site.path, site.layer, "bias", False, module)
  return slots

"""PEFT's forms of our methods: their configs' fields, tensors by kind, and roles."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lorax_flax.errors import LoraxError, unknown
from lorax_flax.hub.peft import soft
from lorax_flax.hub.peft.config import CONFIG_FILE, LORA, PeftConfig
from lorax_flax.methods import METHODS, KernelDelta, LoRA
from lorax_flax.methods.peft_form import Keys, PeftForm

# The fields that every type's config has.
_COMMON = (
  "target_modules",
  "exclude_modules",
  "modules_to_save",
  "layers_to_transform",
  "layers_pattern",
  "task_type",
  "auto_mapping",
  "base_model_name_or_path",
  "revision",
)

# The roles of our kernel's axes, of one layer.
ROLES: Mapping[str, tuple[str, ...]] = {
  "linear": ("in", "out"),
  "embedding": ("in", "out"),
  "turned": ("in", "out"),
  "conv": ("in", "in", "in", "out"),
  "experts": ("stack", "in", "out"),
}


def _types() -> dict[str, type[KernelDelta]]:
  """The method of each peft_type; of LORA, plain LoRA."""
  found: dict[str, type[KernelDelta]] = {LORA: LoRA}
  for method in METHODS.values():
    if issubclass(method, KernelDelta) and method.peft:
      found.setdefault(method.peft.type, method)
  return found


def form_of(peft_type: Any) -> PeftForm:
  """The form of a peft_type.

  Raises:
    LoraxError: one that no method here has.
  """
  forms = {name: method.peft or PeftForm() for name, method in _types().items()}
  forms |= {name: each.peft for name, each in soft.FORMS.items()}
  if not isinstance(peft_type, str) or peft_type not in forms:
    raise LoraxError(f"{CONFIG_FILE}: {unknown('peft_type', str(peft_type), forms)}")
  return forms[peft_type]


def fields_of(form: PeftForm) -> dict[str, tuple[str, Any]]:
  """The fields of a type's config: PEFT's name to `PeftConfig`'s, and the default."""
  ours = {each.name for each in fields(PeftConfig)} - {"peft_type", "options"}
  default = PeftConfig()
  if form.type == LORA:
    return {name: (name, getattr(default, name)) for name in ours}
  common = {n: (n, None) for n in _COMMON if n not in form.lacks}
  return common | dict(form.fields)


def method_of(config: PeftConfig) -> type[KernelDelta]:
  """The method of a config: that of its type; of LORA, the one whose flag is on."""
  for method in METHODS.values():
    flag = method.peft.flag if method.peft else None
    if flag is not None and getattr(config, flag) and issubclass(method, KernelDelta):
      return method
  return _types()[config.peft_type]


def soft_form_of(config: PeftConfig) -> soft.SoftForm | None:
  """The form of a folder of states beside the base's weights; None of deltas."""
  return soft.FORMS.get(config.peft_type)


def keys_of(method: type[KernelDelta], kind: str, rank: int) -> Keys | None:
  """The ends of keys that a module of a kind has; None: PEFT has no such module.

  Args:
    rank: of the module's factors.
  """
  keys = method.peft.keys.get(kind) if method.peft else None
  return keys and {
    end: (leaf, form.of_rank(rank)) for end, (leaf, form) in keys.items()
  }

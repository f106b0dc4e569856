"""PEFT's forms of our methods: their configs' fields, tensors by kind, and roles."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lorax_flax.errors import LoraxError, unknown
from lorax_flax.hub.peft import soft
from lorax_flax.hub.peft.config import CONFIG_FILE, DEFAULT_TARGETS, LORA, PeftConfig
from lorax_flax.methods import METHODS, Delta, KernelDelta, LoRA
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


def alone(peft_type: str) -> type[Delta] | None:
  """The method of a type in which no kernel has a delta."""
  return _alone().get(peft_type)


def _alone() -> dict[str, type[Delta]]:
  return {method.alone.type: method for method in METHODS.values() if method.alone}


def form_of(peft_type: Any) -> PeftForm:
  """The form of a peft_type.

  Raises:
    LoraxError: one that no method here has.
  """
  forms = {name: method.peft or PeftForm() for name, method in _types().items()}
  forms |= {name: method.alone or PeftForm() for name, method in _alone().items()}
  forms |= {name: each.peft for name, each in soft.FORMS.items()}
  if not isinstance(peft_type, str) or peft_type not in forms:
    raise LoraxError(f"{CONFIG_FILE}: {unknown('peft_type', str(peft_type), forms)}")
  return forms[peft_type]


def fields_of(form: PeftForm) -> dict[str, tuple[str, Any]]:
  """The fields of a type's config: PEFT's name to `PeftConfig`'s, and the default."""
  ours = {each.name for each in fields(PeftConfig)} - {
    "peft_type",
    "options",
    "kept_ranks",
  }
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


def with_defaults(config: PeftConfig, family: str) -> PeftConfig:
  """A config whose empty fields that name modules are PEFT's defaults of its type."""
  if soft_form_of(config) is not None:
    return config
  form = form_of(config.peft_type)
  targets = {**({} if form.own_targets else DEFAULT_TARGETS), **form.targets}
  return config.with_defaults(family, targets, form.selected)


def options_of(config: PeftConfig, module: str) -> dict[str, Any]:
  """The method's options, all of them, at one module."""
  method = method_of(config)
  named = {name: config.selects(name, module) for name in method.selections}
  return {**method.options, **config.options, **named}


def keys_of(
  method: type[KernelDelta], kind: str, rank: int, options: Mapping[str, Any]
) -> Keys | None:
  """The ends of keys that a module of a kind has; None: PEFT has no such module.

  Args:
    rank: of the module's factors.
    options: of the method, at the module.
  """
  kind = " ".join([*(n for n in method.selections if options[n]), kind])
  keys = method.peft.keys.get(kind) if method.peft else None
  return keys and {
    end: (leaf, form.of_rank(rank)) for end, (leaf, form) in keys.items()
  }

"""PEFT's forms of our methods: which tensors each kind of module has, and roles."""

from collections.abc import Mapping

from lorax_flax.hub.peft.config import PeftConfig
from lorax_flax.methods import METHODS, KernelDelta, LoRA
from lorax_flax.methods.peft_form import Keys

# The roles of our kernel's axes, of one layer.
ROLES: Mapping[str, tuple[str, ...]] = {
  "linear": ("in", "out"),
  "embedding": ("in", "out"),
  "turned": ("in", "out"),
  "conv": ("in", "in", "in", "out"),
  "experts": ("stack", "in", "out"),
}


def method_of(config: PeftConfig) -> type[KernelDelta]:
  """The method of a config: the one whose flag is on, else LoRA."""
  for method in METHODS.values():
    flag = method.peft.flag if method.peft else None
    if flag is not None and getattr(config, flag) and issubclass(method, KernelDelta):
      return method
  return LoRA


def keys_of(method: type[KernelDelta], kind: str, rank: int) -> Keys | None:
  """The ends of keys that a module of a kind has; None: PEFT has no such module.

  Args:
    rank: of the module's factors.
  """
  keys = method.peft.keys.get(kind) if method.peft else None
  return keys and {
    end: (leaf, form.of_rank(rank)) for end, (leaf, form) in keys.items()
  }

"""The transform: knows paths, shapes and axes, never a model."""

from lorax_flax.adapt.activations import init_from_activations
from lorax_flax.adapt.algebra import as_lora, combine_adapters
from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.gradients import init_from_gradients
from lorax_flax.adapt.many import Many, many
from lorax_flax.adapt.merge import merge, unmerge
from lorax_flax.adapt.partition import (
  combine,
  freeze,
  params_mask,
  partition,
  trainable_mask,
)
from lorax_flax.adapt.plan import Plan, Target
from lorax_flax.adapt.training import penalty, scheduled
from lorax_flax.adapt.transform import Adapted, adapt

__all__ = [
  "Adapted",
  "LoraConfig",
  "Many",
  "Plan",
  "Target",
  "adapt",
  "as_lora",
  "combine",
  "combine_adapters",
  "freeze",
  "init_from_activations",
  "init_from_gradients",
  "many",
  "merge",
  "params_mask",
  "partition",
  "penalty",
  "scheduled",
  "trainable_mask",
  "unmerge",
]

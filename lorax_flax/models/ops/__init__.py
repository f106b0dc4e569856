"""Operations that families share: activations, norms, attention, rotary positions.

Where automatic differentiation would keep many arrays for the backward pass, or make
several passes over memory, an operation has a gradient of its own.
Forward-mode differentiation is not defined for these.
"""

from lorax_flax.models.ops.activations import (
  ACTIVATIONS,
  activation,
  gated,
  gelu,
  gelu_tanh,
)
from lorax_flax.models.ops.attention import attention, attention_by_place
from lorax_flax.models.ops.biased import biased_attention
from lorax_flax.models.ops.norm import layer_norm, rms_norm
from lorax_flax.models.ops.rope import Rope, Rotations, rotate, rotations

__all__ = [
  "ACTIVATIONS",
  "Rope",
  "Rotations",
  "activation",
  "attention",
  "attention_by_place",
  "biased_attention",
  "gated",
  "gelu",
  "gelu_tanh",
  "layer_norm",
  "rms_norm",
  "rotate",
  "rotations",
]

"""The maths that every family shares: activations, layer norm, attention.

Each has a gradient of its own that keeps few arrays for the backward pass and is one
pass over memory where the plain derivative is several. Forward-mode differentiation is
not defined for them.
"""

from lorax_flax.models.ops.activations import (
  ACTIVATIONS,
  activation,
  gelu,
  gelu_tanh,
)
from lorax_flax.models.ops.attention import attention
from lorax_flax.models.ops.norm import layer_norm

__all__ = [
  "ACTIVATIONS",
  "activation",
  "attention",
  "gelu",
  "gelu_tanh",
  "layer_norm",
]

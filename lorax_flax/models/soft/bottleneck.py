"""Bottleneck adapters: x + up(activation(down(x))) on the output of a layer's parts.

Houlsby's (arXiv 1902.00751) follow attention and the feed-forward part, before these
are added to their input; Pfeiffer's (arXiv 2005.00247) the feed-forward part alone.
The up projection starts at zero: the model is then its base.
"""

from typing import Any

import flax.linen as nn
import jax

from lorax_flax.models import ops
from lorax_flax.models.layers import Module
from lorax_flax.models.soft.part import Part

_READS = ("size", "activation", "std")
_STD = {"up": 0.0, "down": 0.01}
HOULSBY = Part(std=_STD, reads=_READS, after=("attention", "mlp"))
PFEIFFER = Part(std=_STD, reads=_READS, after=("mlp",))


class Bottleneck(Module[Any]):
  """One adapter; its projections have biases."""

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    settings = self.config.soft
    down = self.dense(settings.size, ("embed", "rank"), "down")
    up = self.dense(x_BxTxD.shape[-1], ("rank", "embed"), "up")
    return x_BxTxD + up(ops.activation(settings.activation)(down(x_BxTxD)))


def adapted(module: Any, part: str, x_BxTxD: jax.Array) -> jax.Array:
  """The output of a layer's part, through its adapter where the settings have one.

  Args:
    module: the caller, of a compact method.
    part: "attention" or "mlp".
  """
  soft = module.config.soft
  if soft is None or part not in soft.part.after:
    return x_BxTxD
  made = Bottleneck(module.config, module.dtype, name=f"{part}_adapter")
  return made(x_BxTxD)

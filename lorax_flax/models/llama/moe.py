"""A mixture of experts in the place of a feed-forward part.

Sources: arXiv 2401.04088 (Mixtral), as transformers computes it. Every expert computes
every token, and what was not chosen is weighted by zero: exact, and num_experts /
num_experts_per_tok times the products that a dispatch of tokens would need. On a mesh
with an axis for them, a device computes its own experts alone.

Shapes: N tokens of a batch, D hidden_size, E experts, C chosen experts, M features of
an expert.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lorax_flax.models import ops
from lorax_flax.models.layers import DType
from lorax_flax.models.llama.config import DecoderConfig
from lorax_flax.sharding import activations as spread


def _param(module: nn.Module, c: DecoderConfig, name: str, axes, shape) -> jax.Array:
  start = nn.initializers.normal(c.initializer_range)
  value: Any = module.param(name, nn.with_logical_partitioning(start, axes), shape)
  return value


class Router(nn.Module):
  """How much each expert has to say to each token."""

  config: DecoderConfig
  experts: int
  dtype: DType

  @nn.compact
  def __call__(self, x_NxD: jax.Array) -> jax.Array:
    """Weights, NxE float32, zero for experts that are not chosen."""
    c = self.config
    shape = x_NxD.shape[-1], self.experts
    kernel_DxE = _param(self, c, "weight", ("embed", "choices"), shape)
    logits_NxE = x_NxD @ kernel_DxE.astype(self.dtype)
    shares_NxE = jax.nn.softmax(logits_NxE.astype(jnp.float32))
    top_NxC, chosen_NxC = lax.top_k(shares_NxE, c.num_experts_per_tok)
    if c.norm_topk_prob:
      top_NxC /= top_NxC.sum(-1, keepdims=True)
    places_NxCxE = jax.nn.one_hot(chosen_NxC, self.experts, dtype=jnp.float32)
    return jnp.einsum("NC,NCE->NE", top_NxC, places_NxCxE)


class Experts(nn.Module):
  """Gated feed-forward parts, their weights stacked."""

  config: DecoderConfig
  experts: int
  dtype: DType

  @nn.compact
  def __call__(self, x_NxD: jax.Array, weights_NxE: jax.Array) -> jax.Array:
    c, e, d, m = self.config, self.experts, x_NxD.shape[-1], self.config.expert_size
    axes = ("expert", "embed", "mlp")
    up_ExDx2M = _param(self, c, "gate_up_proj", axes, (e, d, 2 * m))
    axes = ("expert", "mlp", "embed")
    down_ExMxD = _param(self, c, "down_proj", axes, (e, m, d))
    # The expert is a batch axis of every product: that is how a LoRA finds a pair of
    # factors for each.
    apart = spread.shard_experts
    x_ExNxD = apart(jnp.broadcast_to(x_NxD[None], (e, *x_NxD.shape)))
    made_ExNx2M = apart(
      jnp.einsum("END,EDM->ENM", x_ExNxD, up_ExDx2M.astype(self.dtype))
    )
    y_ExNxM = apart(ops.gated(c.hidden_act, *jnp.split(made_ExNx2M, 2, axis=-1)))
    y_ExNxD = apart(jnp.einsum("ENM,EMD->END", y_ExNxM, down_ExMxD.astype(self.dtype)))
    y_NxD = jnp.einsum("END,NE->ND", y_ExNxD.astype(jnp.float32), weights_NxE)
    return spread.shard_rows(y_NxD.astype(self.dtype))


class Mixture(nn.Module):
  """A router and its experts."""

  config: DecoderConfig
  dtype: DType

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    c, experts = self.config, self.config.num_experts
    assert experts is not None  # Or this is no mixture.
    x_NxD = x_BxTxD.reshape((-1, x_BxTxD.shape[-1]))
    weights_NxE = Router(c, experts, self.dtype, name="gate")(x_NxD)
    y_NxD = Experts(c, experts, self.dtype, name="experts")(x_NxD, weights_NxE)
    return y_NxD.reshape(x_BxTxD.shape)

"""A mixture of experts in place of a feed-forward part.

Source: arXiv 2401.04088 (Mixtral), as transformers computes it. Every expert computes
every token, and those that were not chosen have weight zero: exact, at num_experts /
num_experts_per_tok times the FLOPs of a dispatch of tokens. On a mesh with an axis of
experts, a device computes its own experts alone.

Shapes: N tokens of a batch, D hidden_size, E experts, C chosen experts, M features of
an expert.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lorax_flax.models import ops
from lorax_flax.models.layers import Module
from lorax_flax.models.llama.config import DecoderConfig
from lorax_flax.sharding import activations as spread


def _param(module: nn.Module, c: DecoderConfig, name: str, axes, shape) -> jax.Array:
  start = nn.initializers.normal(c.initializer_range)
  value: Any = module.param(name, nn.with_logical_partitioning(start, axes), shape)
  return value


class Router(Module[DecoderConfig]):
  """The weight of each expert for each token."""

  experts: int

  @nn.compact
  def __call__(self, x_NxD: jax.Array) -> jax.Array:
    """Weights, NxE float32, zero for experts that are not chosen."""
    c = self.config
    shape = x_NxD.shape[-1], self.experts
    kernel_DxE = _param(self, c, "weight", ("embed", "choices"), shape)
    logits_NxE = x_NxD @ kernel_DxE.astype(self.dtype)
    probs_NxE = jax.nn.softmax(logits_NxE.astype(jnp.float32))
    top_NxC, chosen_NxC = lax.top_k(probs_NxE, c.num_experts_per_tok)
    if c.norm_topk_prob:
      top_NxC /= top_NxC.sum(-1, keepdims=True)
    one_hot_NxCxE = jax.nn.one_hot(chosen_NxC, self.experts, dtype=jnp.float32)
    return jnp.einsum("NC,NCE->NE", top_NxC, one_hot_NxCxE)


class Experts(Module[DecoderConfig]):
  """Gated feed-forward parts, their weights stacked."""

  experts: int

  @nn.compact
  def __call__(self, x_NxD: jax.Array, weights_NxE: jax.Array) -> jax.Array:
    c, e, d, m = self.config, self.experts, x_NxD.shape[-1], self.config.expert_size
    axes = ("expert", "embed", "mlp")
    up_ExDx2M = _param(self, c, "gate_up_proj", axes, (e, d, 2 * m))
    axes = ("expert", "mlp", "embed")
    down_ExMxD = _param(self, c, "down_proj", axes, (e, m, d))
    # The expert is a batch axis of every product, so that a LoRA has a pair of factors
    # for each.
    shard = spread.shard_experts
    x_ExNxD = shard(jnp.broadcast_to(x_NxD[None], (e, *x_NxD.shape)))
    gate_up_ExNx2M = shard(
      jnp.einsum("END,EDM->ENM", x_ExNxD, up_ExDx2M.astype(self.dtype))
    )
    y_ExNxM = shard(ops.gated(c.hidden_act, *jnp.split(gate_up_ExNx2M, 2, axis=-1)))
    y_ExNxD = shard(jnp.einsum("ENM,EMD->END", y_ExNxM, down_ExMxD.astype(self.dtype)))
    y_NxD = jnp.einsum("END,NE->ND", y_ExNxD.astype(jnp.float32), weights_NxE)
    return spread.shard_rows(y_NxD.astype(self.dtype))


class Mixture(Module[DecoderConfig]):
  """A router and its experts."""

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    c, experts = self.config, self.config.num_experts
    assert experts is not None  # Otherwise this is not a mixture.
    x_NxD = x_BxTxD.reshape((-1, x_BxTxD.shape[-1]))
    weights_NxE = Router(c, self.dtype, experts, name="gate")(x_NxD)
    y_NxD = Experts(c, self.dtype, experts, name="experts")(x_NxD, weights_NxE)
    return y_NxD.reshape(x_BxTxD.shape)

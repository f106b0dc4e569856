"""A mixture of experts in place of a feed-forward part.

Source: arXiv 2401.04088 (Mixtral), as transformers computes it. Tokens are sorted by
expert, and each expert computes those that chose it: exact, whatever their number.

On a mesh with an axis of experts, tokens are gathered along it, and each device
computes those of its own experts. There are no buffers of a capacity to fill, as an
all-to-all of a fixed size would need.

Shapes: B batch, T tokens, N = B · T tokens, D hidden_size, E experts, C chosen experts,
M features of an expert, R rows: a token for each of its experts.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lorax_flax import ragged
from lorax_flax.models import ops
from lorax_flax.models.layers import Module
from lorax_flax.models.llama.config import DecoderConfig
from lorax_flax.sharding import activations as spread


def _param(module: nn.Module, c: DecoderConfig, name: str, axes, shape) -> jax.Array:
  start = nn.initializers.normal(c.initializer_range)
  value: Any = module.param(name, nn.with_logical_partitioning(start, axes), shape)
  return value


class Router(Module[DecoderConfig]):
  """The experts of each token, and their weights."""

  experts: int

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights, BxTxC float32, and the numbers of the chosen experts, BxTxC int32."""
    c = self.config
    shape = x_BxTxD.shape[-1], self.experts
    kernel_DxE = _param(self, c, "weight", ("embed", "choices"), shape)
    logits_BxTxE = x_BxTxD @ kernel_DxE.astype(self.dtype)
    probs_BxTxE = jax.nn.softmax(logits_BxTxE.astype(jnp.float32))
    top_BxTxC, chosen_BxTxC = lax.top_k(probs_BxTxE, c.num_experts_per_tok)
    if c.norm_topk_prob:
      top_BxTxC /= top_BxTxC.sum(-1, keepdims=True)
    return top_BxTxC, chosen_BxTxC


class Experts(Module[DecoderConfig]):
  """Gated feed-forward parts, their weights stacked."""

  experts: int

  @nn.compact
  def __call__(self, x_BxTxD, weights_BxTxC, chosen_BxTxC) -> jax.Array:
    c, e, d, m = self.config, self.experts, x_BxTxD.shape[-1], self.config.expert_size
    axes = ("expert", "embed", "mlp")
    up_ExDx2M = _param(self, c, "gate_up_proj", axes, (e, d, 2 * m))
    axes = ("expert", "mlp", "embed")
    down_ExMxD = _param(self, c, "down_proj", axes, (e, m, d))
    # Gate and up apart, so that a shard has the same features of both.
    up_ExDx2xM = up_ExDx2M.astype(self.dtype).reshape(e, d, 2, m)
    run = spread.on_experts(partial(_mixed, c), e, m, x_BxTxD.shape[0])
    return run(
      x_BxTxD, weights_BxTxC, chosen_BxTxC, up_ExDx2xM, down_ExMxD.astype(self.dtype)
    )


def _mixed(c, first, x_NxD, weights_NxC, chosen_NxC, up_ExDx2xM, down_ExMxD):
  """The weighted sums of the outputs of experts `first`, `first` + 1, …, NxD."""
  e = up_ExDx2xM.shape[0]
  n, chosen = chosen_NxC.shape
  own_NxC = chosen_NxC - first
  own_NxC = jnp.where((own_NxC >= 0) & (own_NxC < e), own_NxC, e)
  order = jnp.argsort(own_NxC.reshape(-1), stable=True)
  # No token is with more experts than there are here.
  route = _Route(order[: n * min(chosen, e)], jnp.argsort(order).reshape(n, chosen))
  sizes_E = jnp.bincount(own_NxC.reshape(-1), length=e).astype(jnp.int32)
  times = partial(
    ragged.product, sizes_E=sizes_E, active=max(1, n * chosen * e // c.num_experts)
  )
  x_RxD = _rows(x_NxD, route)
  # Two products: what adapters add to each is then added where the gate is computed.
  # An array of both would be read and written again for it, and for its gradient.
  gate_RxM, up_RxM = (times(x_RxD, up_ExDx2xM[:, :, i]) for i in range(2))
  y_RxM = ops.gated(c.hidden_act, gate_RxM, up_RxM)
  y_RxD = times(y_RxM, down_ExMxD)
  weights_R = weights_NxC.reshape(-1)[route.order_R]
  y_RxD = y_RxD.astype(jnp.float32) * weights_R[:, None]
  return _summed(y_RxD.astype(x_NxD.dtype), route)


class _Route(NamedTuple):
  """The tokens of rows that are sorted by expert; the last ones may have none here.

  Attributes:
    order_R: number of each row's token and choice, of N · C.
    places_NxC: of each token and choice, its row; R or more where there is none.
  """

  order_R: jax.Array
  places_NxC: jax.Array


@jax.custom_vjp
def _rows(x_NxD: jax.Array, route: _Route) -> jax.Array:
  """The row of each token and choice, RxD.

  Gathers alone: the gradient of an indexing would be a scatter.
  """
  return x_NxD[route.order_R // route.places_NxC.shape[1]]


@jax.custom_vjp
def _summed(y_RxD: jax.Array, route: _Route) -> jax.Array:
  """The sum of each token's rows, NxD: the transpose of `_rows`."""
  y_NxCxD = y_RxD.at[route.places_NxC].get(mode="fill", fill_value=0)
  return y_NxCxD.sum(1, dtype=jnp.float32).astype(y_RxD.dtype)


_rows.defvjp(
  lambda x, route: (_rows(x, route), route),
  lambda route, ct: (_summed(ct, route), None),
)
_summed.defvjp(
  lambda y, route: (_summed(y, route), route),
  lambda route, ct: (_rows(ct, route), None),
)


class Mixture(Module[DecoderConfig]):
  """A router and its experts."""

  @nn.compact
  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    c, experts = self.config, self.config.num_experts
    assert experts is not None  # Otherwise this is not a mixture.
    weights_BxTxC, chosen_BxTxC = Router(c, self.dtype, experts, name="gate")(x_BxTxD)
    feed = Experts(c, self.dtype, experts, name="experts")
    return feed(x_BxTxD, weights_BxTxC, chosen_BxTxC)

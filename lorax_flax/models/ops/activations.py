"""Element-wise activations, by the names that checkpoints give them."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from lorax_flax.errors import check_known
from lorax_flax.models.ops import order


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """The exact GELU, x Φ(x), in x's dtype; x alone is kept for its gradient.

  Computed by erf, as in torch, in float32 at least.
  """
  wide = _wide(x)
  return (wide * _cdf(wide)).astype(x.dtype)


def _gelu_fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return gelu(x), x


def _gelu_bwd(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
  # d/dx x Φ(x) = Φ(x) + x φ(x), in one pass over x.
  _, x = order.recomputed((), x, grad)
  wide = _wide(x)
  density = jnp.exp(-0.5 * jnp.square(wide)) / math.sqrt(2.0 * math.pi)
  slope = _cdf(wide) + wide * density
  return ((grad.astype(wide.dtype) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_fwd, _gelu_bwd)


def _cdf(x: jax.Array) -> jax.Array:
  return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(order.wide(x.dtype))


def gelu_tanh(x: jax.Array) -> jax.Array:
  """GELU's tanh approximation, in x's dtype."""
  return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": gelu,
  "gelu_new": gelu_tanh,
  "gelu_pytorch_tanh": gelu_tanh,
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "swish": jax.nn.silu,
  "tanh": jnp.tanh,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
  """The function of a Hugging Face `hidden_act`. Unknown name: LoraxError."""
  check_known("activation", name, ACTIVATIONS)
  return ACTIVATIONS[name]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(name: str, gate: jax.Array, up: jax.Array) -> jax.Array:
  """activation(gate) · up (arXiv 2002.05202); these two are kept for its gradient."""
  return activation(name)(gate) * up


def _gated_fwd(name, gate, up):
  return gated(name, gate, up), (gate, up)


def _gated_bwd(name, kept, grad):
  gate, up = kept
  up, gate = order.recomputed(up, gate, grad)
  return jax.vjp(lambda gate, up: activation(name)(gate) * up, gate, up)[1](grad)


gated.defvjp(_gated_fwd, _gated_bwd)

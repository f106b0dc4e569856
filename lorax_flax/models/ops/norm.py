"""Layer norm and RMS norm."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from lorax_flax.models.ops import order


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
  x_BxTxD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float
) -> jax.Array:
  """Normalises the last axis; statistics in float32, result in x's dtype.

  x and two numbers per row are kept for the gradient.
  """
  return _fwd(x_BxTxD, scale_D, bias_D, eps)[0]


def _fwd(x_BxTxD, scale_D, bias_D, eps):
  x = x_BxTxD.astype(order.wide(x_BxTxD.dtype))
  mean = x.mean(-1, keepdims=True)
  inverse = lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)
  y = (x - mean) * inverse * _row(scale_D, x) + _row(bias_D, x)
  return y.astype(x_BxTxD.dtype), (x_BxTxD, mean, inverse, scale_D, bias_D)


def _bwd(eps, kept, grad):
  del eps
  kept, inverse = order.recomputed(kept, kept[2], grad[..., :1])
  x_BxTxD, mean, _, scale_D, bias_D = kept
  normed = (x_BxTxD.astype(mean.dtype) - mean) * inverse
  grad = grad.astype(mean.dtype)
  scale_D = scale_D.astype(mean.dtype)
  # The means over a row of d_normed and of d_normed · normed, as products with the
  # scale: a sum would have d_normed stored first.
  level = _product(grad, scale_D)
  along = _product(grad * normed, scale_D)
  dx = (grad * _row(scale_D, grad) - level - normed * along) * inverse
  dx = dx.astype(x_BxTxD.dtype)
  rows = tuple(range(grad.ndim - 1))
  return (
    # dx is used both by a product and by the norm below it. Without a barrier XLA's CPU
    # compiler inlines its formula into both, with that of the norm above inlined in it:
    # work and memory that grow with the square of the depth.
    lax.optimization_barrier(dx),
    (grad * normed).sum(rows).astype(kept[3].dtype),
    grad.sum(rows).astype(bias_D.dtype),
  )


layer_norm.defvjp(_fwd, _bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def rms_norm(
  x: jax.Array, scale_D: jax.Array, eps: float, offset: float = 0.0, late: bool = False
) -> jax.Array:
  """Divides the last axis by its root mean square; statistics in float32.

  Source: arXiv 1910.07467. x and one number per row are kept for the gradient.

  Args:
    x: (…, D).
    offset: added to the scale (1 where checkpoints keep the scale less one: Gemma).
    late: round to x's dtype after the product with the scale (Gemma), not before it
      (Llama, T5).

  Returns:
    (…, D), in x's dtype.
  """
  return _rms_fwd(x, scale_D, eps, offset, late)[0]


def _rms_fwd(x, scale_D, eps, offset, late):
  wide = x.astype(order.wide(x.dtype))
  inverse = lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
  normed = wide * inverse
  y = normed if late else normed.astype(x.dtype)
  y = (y * (_row(scale_D, y) + offset)).astype(x.dtype)
  return y, (x, inverse, scale_D)


def _rms_bwd(eps, offset, late, kept, grad):
  del eps, late
  kept, inverse = order.recomputed(kept, kept[1], grad[..., :1])
  x, _, scale_D = kept
  normed = x.astype(inverse.dtype) * inverse
  grad = grad.astype(inverse.dtype)
  wide_D = scale_D.astype(inverse.dtype) + offset
  along = _product(grad * normed, wide_D)
  dx = ((grad * _row(wide_D, grad) - normed * along) * inverse).astype(x.dtype)
  rows = tuple(range(grad.ndim - 1))
  # The barrier has the same reason as in `_bwd`.
  return lax.optimization_barrier(dx), (grad * normed).sum(rows).astype(scale_D.dtype)


rms_norm.defvjp(_rms_fwd, _rms_bwd)


def _row(v_D: jax.Array, like: jax.Array) -> jax.Array:
  """A vector over the last axis, in the rank and dtype of `like`."""
  return jnp.expand_dims(v_D.astype(like.dtype), tuple(range(like.ndim - 1)))


def _product(x: jax.Array, v_D: jax.Array) -> jax.Array:
  """The mean of x · v over the last axis, which stays with size 1."""
  return (jnp.einsum("...d,d->...", x, v_D) / v_D.size)[..., None]

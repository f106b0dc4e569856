"""PiSSA (arXiv 2404.02948): LoRA that starts with the kernel's largest directions."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from lorax_flax.methods.from_start import FromStart
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class PiSSA(FromStart):
  """Fields of `FromStart`; the options are of the start.

  niter=0 is the exact SVD; above, the number of power iterations of a randomised one
  (arXiv 0909.4061), which is fast for large kernels: PEFT's pissa_niter_4.
  """

  options: ClassVar = {"niter": 0}

  @classmethod
  def of_matrices(cls, key, w, scale, target):
    """√(S / scale) on both sides of the largest singular directions."""
    u, s, v = _largest(key, w, target.rank, target.options["niter"])
    root = jnp.sqrt(s[..., None, :] / scale)
    return u * root, jnp.swapaxes(root, -1, -2) * v


def _largest(
  key: jax.Array, w: jax.Array, rank: int, niter: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The largest singular directions: (…, in, rank), (…, rank), (…, rank, out)."""
  basis = None
  if niter:
    width = min(rank + 8, *w.shape[-2:])
    basis = w @ jax.random.normal(key, (w.shape[-1], width))
    for _ in range(niter):
      basis = jnp.linalg.qr(basis)[0]
      basis = w @ jnp.linalg.qr(jnp.swapaxes(w, -1, -2) @ basis)[0]
    basis = jnp.linalg.qr(basis)[0]
    w = jnp.swapaxes(basis, -1, -2) @ w
  u, s, v = jnp.linalg.svd(w, full_matrices=False)
  u = u if basis is None else basis @ u
  return u[..., :rank], s[..., :rank], v[..., :rank, :]

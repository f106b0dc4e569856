"""OLoRA (arXiv 2406.01775): LoRA that starts with the kernel's QR decomposition."""

from dataclasses import dataclass

import jax.numpy as jnp

from lorax_flax.methods.from_start import FromStart
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class OLoRA(FromStart):
  """Fields of `FromStart`; b starts with orthonormal rows."""

  @classmethod
  def of_matrices(cls, key, w, scale, target):
    """The first rows of R and columns of Q, of the kernel as torch has it."""
    del key, scale
    q, r = jnp.linalg.qr(jnp.swapaxes(w, -1, -2))
    first, second = jnp.swapaxes(r, -1, -2), jnp.swapaxes(q, -1, -2)
    return first[..., : target.rank], second[..., : target.rank, :]

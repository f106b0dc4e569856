"""Rows of a table trained in place, the others frozen: PEFT's trainable tokens.

W' is W with some rows replaced. It is followed as a low-rank change of W, E (new - old)
with the one-hot rows E, so that neither W' nor a gradient of W's size is formed.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp

from lorax_flax.methods.low_rank import Parts


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
  """Replaces entries of a matrix along one axis: tokens along the vocabulary.

  Attributes:
    rows: (n, width), float32, trained; starts as what W has there.
    old_rows: (n, width), what W has there, so that `unmerge` can put it back.
    indices: the n places along the axis.
    roles: ("in", "out") or ("out", "in"), the role of each axis of W.
    axis: the vocabulary's: 0 of an embedding, 1 of a head's kernel.
  """

  rows: jax.Array
  old_rows: jax.Array
  indices: tuple[int, ...] = field(metadata={"static": True})
  roles: tuple[str, ...] = field(metadata={"static": True})
  axis: int = field(default=0, metadata={"static": True})

  trained: ClassVar[tuple[str, ...]] = ("rows",)
  # They are themselves, whatever they are multiplied with.
  dropout: ClassVar[float] = 0.0

  def factors(self, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The new rows as factors laid out like the kernel, as `LowRank.factors`."""
    return self._factors(shape, self.rows)

  def parts(self, w: jax.Array) -> Parts:
    """What is made of the kernel w, unevaluated."""
    return Parts(
      *self._factors(w.shape, self.rows - _taken(w, self.indices, self.axis))
    )

  def merged(self, w: jax.Array) -> jax.Array:
    """W', dense, float32."""
    return self._put(w, self.rows)

  def unmerged(self, w: jax.Array) -> jax.Array:
    """W back from W', dense, float32."""
    return self._put(w, self.old_rows)

  def _factors(self, shape, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    places = jnp.arange(shape[self.axis], dtype=jnp.int32)
    # Compared where it is used, not stored: XLA fuses it into the look-up.
    one_hot = (places[:, None] == jnp.asarray(self.indices)[None]).astype(jnp.float32)
    one_hot = jnp.expand_dims(one_hot, 1 - self.axis)
    rows = jnp.expand_dims(rows.T, self.axis)
    in_first = self.roles[self.axis] == "in"
    return (one_hot, rows) if in_first else (rows, one_hot)

  def _put(self, w: jax.Array, rows: jax.Array) -> jax.Array:
    w = jnp.moveaxis(w.astype(jnp.float32), self.axis, 0)
    return jnp.moveaxis(w.at[jnp.asarray(self.indices)].set(rows), 0, self.axis)


def init(
  w: jax.Array, indices: tuple[int, ...], roles: tuple[str, ...], axis: int
) -> Rows:
  """The starting delta, which changes nothing."""
  rows = _taken(w, indices, axis)
  return Rows(rows, rows, indices, roles, axis)


def _taken(w: jax.Array, indices: tuple[int, ...], axis: int) -> jax.Array:
  rows = jnp.take(w, jnp.asarray(indices), axis=axis)
  return jnp.moveaxis(rows, axis, 0).astype(jnp.float32)

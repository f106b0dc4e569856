"""Rows of a table trained in place, the others frozen: PEFT's trainable tokens.

W' is W with some rows replaced. It is followed as a low-rank change of W, E (new - old)
with the one-hot rows E, so that neither W' nor a gradient of W's size is formed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError
from lorax_flax.methods.axes import Shape
from lorax_flax.methods.kernel_delta import Followed
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import AS_IS, PeftForm
from lorax_flax.nodes import node

_ROWS = {"trainable_tokens_delta": ("rows", AS_IS)}
_KEYS = {f"token_adapter.{end}": leaf for end, leaf in _ROWS.items()}


@node
@dataclass(frozen=True)
class Rows(Followed):
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

  axes: ClassVar = {"rows": ("places", "width"), "old_rows": ("places", "width")}
  trained = ("rows",)
  peft = PeftForm(keys={"linear": _KEYS, "embedding": _KEYS})
  alone = PeftForm(
    type="TRAINABLE_TOKENS",
    keys={"linear": _ROWS, "embedding": _ROWS},
    fields={"token_indices": ("trainable_token_indices", ())},
    lacks=(
      "exclude_modules",
      "layers_to_transform",
      "layers_pattern",
      "modules_to_save",
    ),
    training={"init_weights": True},
    own_targets=True,
  )
  # They are themselves, whatever they are multiplied with.
  dropout: ClassVar[float] = 0.0

  @classmethod
  def start(
    cls, w: jax.Array, indices: tuple[int, ...], roles: tuple[str, ...], axis: int
  ) -> Self:
    """The delta before the first step; it changes nothing."""
    rows = _taken(w, indices, axis)
    return cls(rows, rows, indices, roles, axis)

  @classmethod
  def of(cls, rows: jax.Array, w: jax.Array, indices, roles, axis: int) -> Self:
    """A delta that has these rows, (n, width), in the places of those of w."""
    return cls(rows, _taken(w, indices, axis), indices, roles, axis)

  def kernel_axes(self) -> Mapping[str, tuple[int, ...]]:
    return {**super().kernel_axes(), "width": (1 - self.axis,)}

  def sizes(self) -> dict[str, int]:
    return {"places": len(self.indices)}

  def check(self, path: str, base: Shape) -> None:
    super().check(path, base)
    if max(self.indices) >= base[self.axis]:
      raise LoraxError(
        f"the adapter's delta of {path!r} is for the rows {self.indices}, the base has"
        f" shape {base}"
      )

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, unevaluated."""
    places = jnp.arange(w.shape[self.axis], dtype=jnp.int32)
    # Compared where it is used, not stored: XLA fuses it into the look-up.
    one_hot = (places[:, None] == jnp.asarray(self.indices)[None]).astype(jnp.float32)
    one_hot = jnp.expand_dims(one_hot, 1 - self.axis)
    change = self.rows - _taken(w, self.indices, self.axis)
    change = jnp.expand_dims(change.T, self.axis)
    in_first = self.roles[self.axis] == "in"
    return Parts(one_hot, change) if in_first else Parts(change, one_hot)

  def merged(self, w: jax.Array) -> jax.Array:
    """W', dense, float32."""
    return self._put(w, self.rows)

  def unmerged(self, w: jax.Array) -> jax.Array:
    """W back from W', dense, float32, exactly."""
    return self._put(w, self.old_rows)

  def _put(self, w: jax.Array, rows: jax.Array) -> jax.Array:
    w = jnp.moveaxis(w.astype(jnp.float32), self.axis, 0)
    return jnp.moveaxis(w.at[jnp.asarray(self.indices)].set(rows), 0, self.axis)


def _taken(w: jax.Array, indices: tuple[int, ...], axis: int) -> jax.Array:
  rows = jnp.take(w, jnp.asarray(indices), axis=axis)
  return jnp.moveaxis(rows, axis, 0).astype(jnp.float32)

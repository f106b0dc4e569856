"""A targeted weight on its way through the program: its value and its delta."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax_flax.methods.lora import dense


class Dim(NamedTuple):
  """One axis of a view.

  Attributes:
    labels: the (path, axis) of the kernel axes that lie in this axis.
    role: "in", "out" or "stack"; None of an axis that no kernel axis lies in; "?" while
      the roles are being found.
  """

  labels: frozenset[tuple[str, int]]
  role: str | None


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["value", "a", "b", "index"],
  meta_fields=["path", "dims", "dropout"],
)
@dataclass(frozen=True)
class View:
  """W + sum_r a * b, unevaluated.

  Attributes:
    value: W as the program sees it here, cast, transposed or reshaped. While the roles
      are being found it is a ShapeDtypeStruct.
    a, b: the delta's factors with W's axes and a last axis r; of size 1 on the axes
      that a factor does not carry: "in" axes are a's, "out" axes b's, "stack" axes
      both's. None while the roles are being found.
    index: () int32, the place in the program's repeated structure (which layer, which
      iteration), on which LoRA's dropout depends.
    path: the weight's path; of several joined weights, the first's.
    dims: static, one for each axis of W.
    dropout: the delta's rate, static.
  """

  value: Any
  a: Any
  b: Any
  index: Any
  path: str
  dims: tuple[Dim, ...]
  dropout: float

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.value.shape)

  @property
  def dtype(self):
    return self.value.dtype

  def paths(self) -> set[str]:
    return {self.path} | {path for dim in self.dims for path, _ in dim.labels}

  def roles_of(self, axes) -> set[str]:
    """The roles met on these axes; axes without a role, or of size 1, do not count."""
    return {
      role
      for i in axes
      if (role := self.dims[i].role) is not None and self.shape[i] != 1
    }

  def on_all(self, fn: Callable, value: Any, dims) -> "View":
    """Applies fn to both factors and takes `value` and `dims` as given."""
    parts = (None, None) if self.a is None else (fn(self.a), fn(self.b))
    return replace(self, value=value, a=parts[0], b=parts[1], dims=tuple(dims))

  def dense(self) -> jax.Array:
    """W + delta, formed."""
    delta = dense(self.a, self.b, jnp.float32)
    delta = jnp.broadcast_to(delta, self.shape)
    return (self.value.astype(jnp.float32) + delta).astype(self.dtype)


def is_view(x: Any) -> bool:
  return isinstance(x, View)

"""A targeted weight on its way through the program: its value and its delta."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax_flax.adapt.interpret.weights import formed
from lorax_flax.methods.parts import dense
from lorax_flax.methods.slots import Choice
from lorax_flax.nodes import node


class Dim(NamedTuple):
  """One axis of a view.

  Attributes:
    labels: the (path, axis) of the kernel axes that this axis holds.
    role: "in", "out" or "stack"; None of an axis that holds no kernel axis; "?" while
      the roles are being found.
  """

  labels: frozenset[tuple[str, int]]
  role: str | None


@node
@dataclass(frozen=True)
class View:
  """out_scale * (W + sum_r a * b), unevaluated, and a bias for each product with it.

  Attributes:
    value: W as the program sees it here, cast, transposed or reshaped; `Stored` where
      the base holds it quantised. It is a ShapeDtypeStruct while the roles are being
      found, and of a change of W alone.
    a, b: the delta's factors with W's axes and a last axis r; of size 1 on the axes
      that a factor does not carry: "in" axes are a's, "out" axes b's, "stack" axes
      both's. None while the roles are being found, and of a frozen weight.
    out_scale: as b, or as a where it scales the inputs, with a last axis of size 1;
      None for 1.
    bias: as b, with a last axis of size 1; None for 0.
    index: () int32, the place in the program's repeated structure (which layer, which
      iteration), on which LoRA's dropout depends.
    path: the weight's path; of several joined weights, the first's.
    dims: static, one for each axis of W.
    dropout: the delta's rate, static.
    looked_up: static, labels and role of the axes along which places were chosen by
      index, where these may be rows of a table; None of a kernel.
    choice: where the last axes hold several adapters side by side, the one that is
      meant; None where they hold one.
  """

  value: Any
  a: Any
  b: Any
  out_scale: Any
  bias: Any
  index: Any
  path: str = field(metadata={"static": True})
  dims: tuple[Dim, ...] = field(metadata={"static": True})
  dropout: float = field(metadata={"static": True})
  looked_up: Dim | None = field(default=None, metadata={"static": True})
  choice: Choice | None = None

  @classmethod
  def shown(cls, shape, dtype, path: str, dims) -> "View":
    """A weight without factors, for while the roles are being found."""
    value = jax.ShapeDtypeStruct(shape, dtype)
    return cls(value, None, None, None, None, None, path, tuple(dims), 0.0)

  @classmethod
  def frozen(cls, value: Any, path: str) -> "View":
    """A weight without a delta, which is followed since it is not an array."""
    dims = (Dim(frozenset(), None),) * len(value.shape)
    return cls(value, None, None, None, None, jnp.int32(0), path, dims, 0.0)

  @property
  def is_frozen(self) -> bool:
    return self.a is None

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.value.shape)

  @property
  def dtype(self):
    return self.value.dtype

  @property
  def is_abstract(self) -> bool:
    return isinstance(self.value, jax.ShapeDtypeStruct)

  @property
  def parts(self) -> tuple[Any, ...]:
    """The arrays that have the weight's axes."""
    return self.value, self.a, self.b, self.out_scale, self.bias

  def with_parts(self, parts) -> "View":
    value, a, b, out_scale, bias = parts
    return replace(self, value=value, a=a, b=b, out_scale=out_scale, bias=bias)

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
    """Applies fn to factors, out_scale and bias; takes `value` and `dims` as given."""
    rest = (None if t is None else fn(t) for t in self.parts[1:])
    return replace(self.with_parts((value, *rest)), dims=tuple(dims))

  def _dense_by_token(self) -> jax.Array:
    """Rows that were looked up, each with its token's adapter."""
    assert self.choice is not None  # Otherwise there is one adapter.
    axis = self.choice.token_axis(self.path, dict(enumerate(self.shape)))
    a, out_scale = self.choice.mask(self.a, axis), self.out_scale
    if out_scale is not None:
      change = self.choice.mask(out_scale - 1, axis)
      out_scale = 1 + jnp.sum(change, axis=-1, keepdims=True)
    return replace(self, a=a, out_scale=out_scale, bias=None, choice=None).dense()

  def chosen(self) -> "View":
    """The view with the parts of the one adapter that is meant.

    Where each token has one, the parts have an axis of tokens before the last.
    """
    if self.choice is None:
      return self
    part = self.choice.part
    view = self.scaled_as_chosen()
    return replace(view, a=part(self.a), b=part(self.b), choice=None)

  def scaled_as_chosen(self) -> "View":
    """The view with the out_scale and the bias of what is meant, as `chosen`'s."""
    if self.choice is None:
      return self
    part = self.choice.part
    out_scale = None if self.out_scale is None else part(self.out_scale, 1.0)
    bias = None if self.bias is None else part(self.bias)
    return replace(self, out_scale=out_scale, bias=bias)

  def settled(self) -> Any:
    """The weight with its value formed; of a frozen one, that value."""
    return self.dense() if self.is_frozen else replace(self, value=formed(self.value))

  def dense(self) -> jax.Array:
    """out_scale * (W + delta), formed; of a change of W alone, without W."""
    if self.is_frozen:
      return formed(self.value)
    if self.choice is not None:
      return self._dense_by_token() if self.choice.by_token else self.chosen().dense()
    delta = dense(self.a, self.b, jnp.float32)
    full = jnp.broadcast_to(delta, self.shape)
    if not self.is_abstract:
      full = formed(self.value).astype(jnp.float32) + full
    if self.out_scale is not None:
      full = full * self.out_scale[..., 0]
    return full.astype(self.dtype)


def is_view(x: Any) -> bool:
  return isinstance(x, View)

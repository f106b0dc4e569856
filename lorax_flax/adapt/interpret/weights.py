"""A quantised weight on its way through the program, formed where it is consumed.

Equations that rearrange it are recorded and none is run. A product forms the dense
kernel, in a rule that keeps for the backward pass what is stored, and forms it again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax_flax import devices, quant
from lorax_flax.adapt.interpret import encoding as jx
from lorax_flax.nodes import node
from lorax_flax.quant import Quantized, dense


@dataclass(frozen=True, eq=False)
class Step:
  """An equation of which a weight is one operand.

  Attributes:
    place: number of that operand.
    result: number of the result that is meant.
  """

  eqn: Any
  place: int
  result: int

  @property
  def aval(self) -> Any:
    return self.eqn.outvars[self.result].aval

  @property
  def is_elementwise(self) -> bool:
    """True where it does to a slice what it does to the full weight."""
    return self.eqn.primitive.name in _ELEMENTWISE and len(self.eqn.invars) == 1


_ELEMENTWISE = {"convert_element_type", "copy", "copy_p", "name", "neg"}


@node
@dataclass(frozen=True)
class Stored:
  """A quantised leaf after some steps, unevaluated.

  Attributes:
    others: for each step, its other operands.
  """

  leaf: Quantized
  others: tuple[tuple[Any, ...], ...] = ()
  steps: tuple[Step, ...] = field(default=(), metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    shaped = (step.aval.shape for step in self.steps[::-1] if not step.is_elementwise)
    return tuple(next(shaped, self.leaf.shape))

  @property
  def dtype(self) -> Any:
    return self.steps[-1].aval.dtype if self.steps else self.leaf.dtype

  @property
  def is_sliceable(self) -> bool:
    """True where a slice along the first axis is one of the stored arrays."""
    return all(step.is_elementwise for step in self.steps)

  def then(self, eqn: Any, operands: Sequence[Any]) -> list["Stored"]:
    """The results of an equation of whose weights this is the first."""
    place = next(i for i, x in enumerate(operands) if x is self)
    others = (*self.others, (*operands[:place], *operands[place + 1 :]))
    return [
      replace(self, others=others, steps=(*self.steps, Step(eqn, place, i)))
      for i in range(len(eqn.outvars))
    ]

  def dense(self) -> jax.Array:
    """The steps' result."""
    value = self.leaf.dense()
    for step, others in zip(self.steps, self.others, strict=True):
      given = [formed(x) for x in others]
      given.insert(step.place, value)
      value = jx.bind(step.eqn, given)[step.result]
    return value


def is_stored(x: Any) -> bool:
  return isinstance(x, Stored)


def formed(x: Any) -> Any:
  """A value as an array."""
  return x.dense() if is_stored(x) else dense(x)


def evaluated(eqn: Any, operands: Sequence[Any]) -> list[Any]:
  """The results of an equation that rearranges or multiplies weights."""
  stored = next(filter(is_stored, operands), None)
  if stored is None:
    return jx.bind(eqn, operands)
  if eqn.primitive.name == "optimization_barrier":
    return list(lax.optimization_barrier(tuple(operands)))
  return stored.then(eqn, operands)


def product(eqn: Any, operands: Sequence[Any]) -> Any:
  """A product of the first two operands, linear in the one that is no weight."""
  place = next((i for i, x in enumerate(operands) if is_stored(x)), None)
  if place is None:
    return jx.bind(eqn, operands)[0]
  weight, x, others = operands[place], operands[1 - place], operands[2:]
  times, times_transposed = _forms(eqn, place, weight, x)

  @jax.custom_vjp
  def multiplied(weight, others, x):
    return times(_after(weight, x), others, x)

  def forward(weight, others, x):
    return multiplied(weight, others, x), (weight, others)

  def backward(kept, gradient):
    weight, others = kept
    return None, None, times_transposed(_after(weight, gradient), others, gradient)

  multiplied.defvjp(forward, backward)
  return multiplied(weight, others, x)


def _forms(eqn: Any, place: int, weight: Stored, x: Any) -> tuple[Callable, Callable]:
  """The product of the weight, other operands and x, and its transpose, of a gradient.

  By a kernel of `quant.KERNELS` where one takes it: a product of rows with a leaf as it
  is. Otherwise the dense kernel is formed.
  """
  kernel = quant.KERNELS.get(devices.platform())
  is_plain = place == 1 and not weight.steps and jx.is_rows_by_matrix(eqn)
  is_plain = is_plain and eqn.outvars[0].aval.dtype == x.dtype
  if kernel is not None and is_plain and kernel.takes(weight.leaf, x):

    def multiply(weight, others, x, transposed=False):
      del others
      return kernel.product(weight.leaf, x, transposed=transposed)

    return multiply, partial(multiply, transposed=True)

  def times(w, others, x):
    return jx.bind(eqn, [*([w, x] if place == 0 else [x, w]), *others])[0]

  def transposed(weight, others, gradient):
    times_w = partial(times, weight.dense(), others)
    (by_x,) = jax.linear_transpose(times_w, jx.struct(x))(gradient)
    return by_x

  return lambda weight, *rest: times(weight.dense(), *rest), transposed


def _after(weight: Stored, x: jax.Array) -> Stored:
  """The weight, available only once x, which it multiplies, is.

  Otherwise the kernels of all layers could be formed first, and kept. Compilers but
  XLA's for CPUs heed the barrier; for that one the leaf's floats, its scales, depend on
  a number of x.
  """
  weight, x = lax.optimization_barrier((weight, x))

  def waiting(part):
    if not jx.is_float(part):
      return part
    return lax.platform_dependent(part, x, cpu=_waiting, default=lambda part, _: part)

  return replace(weight, leaf=jax.tree.map(waiting, weight.leaf))


@jax.custom_batching.custom_vmap
def _waiting(part: jax.Array, x: jax.Array) -> jax.Array:
  """The part itself, computed from a number of x."""
  first = lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())
  # The compiler can't fold the product: it does not know that the factor is finite.
  zero = 0.0 * jnp.where(jnp.isfinite(first), first, jnp.zeros_like(first))
  return part + zero.astype(part.dtype)


@_waiting.def_vmap
def _(size: int, in_batched: Sequence[bool], part: jax.Array, x: jax.Array):
  """One trial's x is enough: a weight that trials share is formed once."""
  del size
  is_stacked, has_trials = in_batched
  wait = partial(_waiting, x=x[0] if has_trials else x)
  return (jax.vmap(wait)(part) if is_stacked else wait(part)), is_stacked

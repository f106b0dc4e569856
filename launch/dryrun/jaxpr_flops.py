"""Matmul FLOPs of a traced function, before the compiler changes it."""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from launch.dryrun import kernels
from lorax_flax import ragged
from lorax_flax.adapt.interpret import encoding


def matmul_flops(jaxpr: Any) -> int:
  """Counts 2 × the multiplications of all dots and convolutions, scans multiplied out.

  Experts count the rows that are expected to choose them.

  Args:
    jaxpr: of the function, `jitted.trace(…).jaxpr`.

  Raises:
    ValueError: a while loop with products in it, whose trip count is not known; a
      kernel that is not known.
  """
  total = 0
  for equation in _used(encoding.open_jaxpr(jaxpr)[0]):
    name = equation.primitive.name
    inner = sum(map(matmul_flops, _inner(equation.params)))
    if name == "dot_general":
      total += _dot(equation)
    elif name == "conv_general_dilated":
      total += _convolution(equation)
    elif name in ("ragged_product", "ragged_outer"):
      total += ragged.flops(equation)
    elif name == "pallas_call":
      total += _kernel(equation)
    elif name == "shard_map":  # What each device does.
      total += inner * equation.params["mesh"].size
    elif name == "scan":
      total += inner * encoding.call(equation).length
    elif name == "while" and inner:
      raise ValueError("a while loop with products in it has no known trip count")
    elif name == "cond":
      total += max(map(matmul_flops, _inner(equation.params)), default=0)
    else:
      total += inner
  return total


def _used(jaxpr: Any) -> Iterator[Any]:
  """The equations whose results are used: a compiler leaves out the others."""
  live = {atom for atom in jaxpr.outvars if not isinstance(atom, encoding.Literal)}
  for equation in reversed(jaxpr.eqns):
    if not live.isdisjoint(equation.outvars):
      yield equation
      live |= {x for x in equation.invars if not isinstance(x, encoding.Literal)}


def _inner(params: Any) -> Iterator[Any]:
  for value in params.values():
    for part in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(encoding.open_jaxpr(part)[0], "eqns"):
        yield part


def _kernel(equation: Any) -> int:
  name = equation.params["name"] or ""
  if (found := kernels.products(name)) is None:
    raise ValueError(f"the products in the kernel {name!r} cannot be counted")
  avals = [x.aval for x in equation.invars]
  floats = [x.shape for x in avals if jnp.issubdtype(x.dtype, jnp.floating)]
  return found.needed * found.flops(floats)


def _dot(equation: Any) -> int:
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  made = math.prod(equation.outvars[0].aval.shape)
  return 2 * made * math.prod(left[i] for i in contracted)


def _convolution(equation: Any) -> int:
  """FLOPs with padding counted as input: exact for patches that do not overlap."""
  numbers = equation.params["dimension_numbers"]
  kernel = equation.invars[1].aval.shape
  made = math.prod(equation.outvars[0].aval.shape)
  return 2 * made * math.prod(kernel) // kernel[numbers.rhs_spec[0]]

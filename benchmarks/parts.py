"""Parts of a CPU training step, each timed alone: products, attention, GELU, norms.

  python -m benchmarks.parts [--method=all_linear] [--layers=12]

A part is compiled and timed by itself, forward and with its gradient, at the shapes of
the step, and multiplied by how often the step has it. Kernels' products are those of
the traced step. The rate is that of one large product; a step of nothing but its
products at that rate is the bound.
"""

import argparse
import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from benchmarks import common
from lorax_flax.models import ops
from lorax_flax.models.ops import norm

_LARGE = 2048  # rows and columns of the large product


def _seconds(call: Callable[[], Any], rounds: int) -> float:
  jax.block_until_ready(call())
  found = []
  for _ in range(rounds):
    start = time.perf_counter()
    jax.block_until_ready(call())
    found.append(time.perf_counter() - start)
  return statistics.median(found)


def _timed(fn: Callable[..., Any], shapes: Any, rounds: int) -> float:
  """Seconds of a function of random arrays."""
  arrays = common.drawn(shapes)
  compiled = jax.jit(fn).lower(*arrays).compile()
  return _seconds(lambda: compiled(*arrays), rounds)


def _with_gradient(fn: Callable[..., jax.Array]) -> Callable[..., Any]:
  """fn and the gradients of its arguments, by a sum that XLA can't leave out."""

  def run(*args):
    y, back = jax.vjp(fn, *args)
    return y, back(y)

  return run


def _products(jaxpr: Any) -> Iterator[Any]:
  """The equations of products, those of inner programs included."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      yield eqn
    for inner in jaxprs_in_params(eqn.params):
      yield from _products(inner)


def _of_kernels(job: common.Job) -> Counter[Any]:
  """The products without batch axes of a step: (shapes, axes) -> number."""
  jaxpr = jax.make_jaxpr(job.step)(job.state, job.base, job.batch)
  return Counter(
    (*(v.aval.shape for v in eqn.invars), eqn.params["dimension_numbers"])
    for eqn in _products(jaxpr.jaxpr)
    if not any(eqn.params["dimension_numbers"][1])
  )


def _flops(product: Any) -> int:
  left, right, ((contracted, _), _) = product
  return (
    2 * math.prod(left) * math.prod(right) // math.prod(left[i] for i in contracted)
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--method", choices=common.METHODS, default="query_value")
  parser.add_argument("--layers", type=int, default=common.ROBERTA_BASE.layers)
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  shape = dataclasses.replace(common.ROBERTA_BASE, layers=args.layers)
  tokens = shape.batch, shape.length
  struct = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
  large = struct(_LARGE, _LARGE)
  rate = 2 * _LARGE**3 / _timed(jnp.matmul, (large, large), args.rounds)

  job = common.job(shape, args.method)
  products = _of_kernels(job)
  compiled, state = job.compile(), job.state

  def step():
    nonlocal state
    state, metrics = compiled(state, job.base, job.batch)
    return metrics

  whole = _seconds(step, args.rounds)
  alone = 0.0
  for product, number in products.items():
    left, right, axes = product
    dot = lambda x, y, axes=axes: jax.lax.dot_general(x, y, axes)
    alone += number * _timed(dot, (struct(*left), struct(*right)), args.rounds)

  heads = struct(*tokens, shape.heads, shape.hidden // shape.heads)
  mask = jnp.ones(tokens, jnp.int32)
  attention = lambda q, k, v: ops.attention(q, k, v, mask)
  scale = struct(shape.hidden)
  normed = lambda x, scale, bias: norm.layer_norm(x, scale, bias, 1e-5)
  others = {
    "attention, with its own products": (attention, (heads,) * 3, shape.layers),
    "GELU": (ops.gelu, (struct(*tokens, shape.mlp),), shape.layers),
    "norms": (normed, (struct(*tokens, shape.hidden), scale, scale), 2 * shape.layers),
  }
  parts = {"products with kernels and factors": alone}
  for name, (fn, shapes, number) in others.items():
    parts[name] = number * _timed(_with_gradient(fn), shapes, args.rounds)
  least = sum(number * _flops(product) for product, number in products.items()) / rate
  parts = {"the step": whole, **parts, "the rest": whole - sum(parts.values())}
  rows = [
    (name, f"{1e3 * s:,.0f}", f"{s / whole:.0%}")
    for name, s in {**parts, "those products at the large one's rate": least}.items()
  ]
  title = f"{shape.layers} layers, {math.prod(tokens)} tokens, {rate / 1e9:.0f} GFLOP/s"
  print(common.table(title, ("part", "ms", "share"), rows))
  print(common.repeat())


if __name__ == "__main__":
  main()

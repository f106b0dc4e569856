"""An adapter on a model that nobody here wrote: what must hold, as a row of a table."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax_flax as lx

CONFIG = lx.LoraConfig(rank=2, targets="all-linear")
RATE, STEPS = 3e-3, 3
HEADER = ("model", "targets", "no-op", "merge", "gradient", "loss", "lines", "note")


class Model(NamedTuple):
  """A function of its parameters, and arguments to call it with.

  Attributes:
    fn: fn(params, *inputs) to a tree of arrays.
    params: any pytree; its arrays are the weights.
    inputs: arrays.
  """

  fn: Callable[..., Any]
  params: Any
  inputs: tuple[Any, ...]


class Row(NamedTuple):
  """Measurements of one model.

  Attributes:
    targets: number of weights that got a delta, of those that a contraction consumes.
    no_op: max |output with the fresh adapter - output|.
    merge: max |output with a moved adapter - output of the merged weights| / max
      |output|.
    gradient: max over the adapter's leaves of max |difference| / max |gradient| to the
      gradient through dense W + delta.
    losses: before each optimiser step, and after the last.
    note: why weights have no delta.
  """

  targets: str
  no_op: float
  merge: float
  gradient: float
  losses: tuple[float, ...]
  note: str


# XLA's optimisations reorder sums; without them a delta of zero adds exactly nothing.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def cells(build: Callable[[], Model]) -> tuple[str, ...]:
  """The columns of `HEADER` but the name; a refusal's text stands in the note."""
  # How much it takes to make a function, parameters and inputs of a library's model.
  lines = len(inspect.getsource(build).strip().splitlines()) - 1
  try:
    row = check(build())
  except lx.LoraxError as e:
    return ("refused", "", "", "", "", str(lines), str(e))
  errors = (f"{x:.0e}" if x else "0" for x in (row.no_op, row.merge, row.gradient))
  losses = f"{row.losses[0]:.4g} > {row.losses[-1]:.4g}"
  return (row.targets, *errors, losses, str(lines), row.note)


def check(model: Model) -> Row:
  """Adapts every linear layer of a model, and compares with dense W + delta.

  Raises:
    LoraxError: the model is refused.
  """
  lora = lx.adapt(model.fn, CONFIG)
  plan = lora.plan(model.params, *model.inputs)
  weights, with_weights = _opened(model.params)

  @_jit
  def init(key, weights):
    return lora.init(key, with_weights(weights), *model.inputs)

  fresh = init(jax.random.key(1), weights)
  trained, rest = lx.partition(fresh, lx.trainable_mask(fresh))
  moved = _moved(trained)

  def adapted(trained, weights):
    return lora.apply(with_weights(weights), lx.combine(trained, rest), *model.inputs)

  def dense(trained, weights):
    params = lx.merge(with_weights(weights), lx.combine(trained, rest))
    return model.fn(params, *model.inputs)

  @_jit
  def plain(weights):
    return _floats(model.fn(with_weights(weights), *model.inputs))

  @_jit
  def started(trained, weights):
    return _floats(adapted(trained, weights))

  base = plain(weights)
  goals = _goals(base)

  def loss_of(fn):
    def loss(trained, weights):
      outs = _floats(fn(trained, weights))
      pairs = zip(outs, goals, strict=True)
      return sum(jnp.mean((y - goal) ** 2) for y, goal in pairs), outs

    value_and_grad = _jit(jax.value_and_grad(loss, has_aux=True))
    return lambda trained: value_and_grad(trained, weights)

  loss = loss_of(adapted)
  (_, got), grads = loss(moved)
  (_, expected), dense_grads = loss_of(dense)(moved)
  return Row(
    f"{len(plan.targets)} of {len(plan.targets) + len(plan.left_out)}",
    _largest(base, started(trained, weights)),
    _relative(got, expected),
    max(_relative(g, d) for g, d in _leaves(grads, dense_grads)),
    _losses(loss, trained),
    plan.summary(),
  )


def _losses(value_and_grad: Callable[..., Any], trained: Any) -> tuple[float, ...]:
  optimizer = optax.adam(RATE)
  state, losses = optimizer.init(trained), []

  @_jit
  def step(trained, state, grads):
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(trained, updates), state

  for _ in range(STEPS):
    (loss, _), grads = value_and_grad(trained)
    losses.append(float(loss))
    trained, state = step(trained, state, grads)
  return (*losses, float(value_and_grad(trained)[0][0]))


POSITIVE = ("gamma", "scale", "var")


def random_like(shapes: Any, seed: int = 0) -> Any:
  """Weights of these shapes, drawn by NumPy, which has nothing to compile."""
  rng = np.random.default_rng(seed)

  def draw(place, x):
    mean = float(any(name in jax.tree_util.keystr(place) for name in POSITIVE))
    fan_in = math.prod(x.shape[:-1])
    std = fan_in**-0.5 if fan_in > 1 else 0.1
    return jnp.asarray(rng.normal(mean, std, x.shape).astype(x.dtype))

  return jax.tree_util.tree_map_with_path(draw, shapes)


def _opened(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
  """The tree's arrays, and a function that puts others in their place."""
  leaves, structure = jax.tree.flatten(tree)
  numbers = [i for i, x in enumerate(leaves) if hasattr(x, "dtype")]

  def rebuilt(arrays: list[Any]) -> Any:
    new = dict(zip(numbers, arrays, strict=True))
    return jax.tree.unflatten(structure, [new.get(i, x) for i, x in enumerate(leaves)])

  return [leaves[i] for i in numbers], rebuilt


def _floats(tree: Any) -> list[jax.Array]:
  """The outputs that have a gradient, in float32."""
  found = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
  return [x.astype(jnp.float32) for x in found if jnp.issubdtype(x.dtype, jnp.floating)]


def _goals(outputs: Iterable[jax.Array]) -> list[np.ndarray]:
  """Outputs to train for: the model's own, and noise of their size."""
  rng = np.random.default_rng(3)
  found = [np.asarray(x) for x in outputs]
  return [x + x.std() * rng.normal(size=x.shape).astype(np.float32) for x in found]


def _moved(tree: Any) -> Any:
  leaves, structure = jax.tree.flatten(tree)
  rng = np.random.default_rng(7)
  moved = [x + 0.1 * rng.normal(size=x.shape).astype(x.dtype) for x in leaves]
  return jax.tree.unflatten(structure, moved)


def _leaves(*trees: Any) -> Iterable[tuple[Any, ...]]:
  return zip(*map(jax.tree.leaves, trees), strict=True)


def _largest(*trees: Any) -> float:
  """max |x| over a tree, or max |x - y| over two."""
  difference = lambda x, y=0.0: float(np.abs(np.asarray(x) - np.asarray(y)).max())
  return max((difference(*xs) for xs in _leaves(*trees)), default=0.0)


def _relative(x: Any, y: Any) -> float:
  return _largest(x, y) / max(_largest(y), 1e-6)

"""The training step and the evaluation step, and the shardings of what they take.

The loop and an ahead-of-time compilation make the step here, so that what is compiled
without devices or weights is the very step that trains.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lorax_flax import devices
from lorax_flax.adapt.partition import partition, trainable_mask, without_replaced
from lorax_flax.adapt.training import penalty, scheduled
from lorax_flax.methods import Adapter
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train import optim
from lorax_flax.train import state as states
from lorax_flax.train.config import Durations, TrainConfig
from lorax_flax.train.losses import Loss
from lorax_flax.train.metrics import Mean
from lorax_flax.train.objective import Objective, Predictions, logits
from lorax_flax.train.optim import Schedule
from lorax_flax.train.state import Base, TrainState

PyTree = Any
Array = TypeVar("Array", bound=jax.typing.ArrayLike)
Batch = Mapping[str, jax.Array]
Metrics = dict[str, Mean]

# params, adapter, batch, key of all dropout or None -> outputs
Forward = Callable[[PyTree, Adapter, Batch, jax.Array | None], Any]

Step = Callable[[TrainState, Base, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[Adapter, Base, Batch], tuple[jax.Array | None, Mean]]


@dataclass(frozen=True)
class Model:
  """A frozen base, and the adapted function of it.

  Attributes:
    forward: the adapted function.
    params: the base: sharded arrays, or ShapeDtypeStructs.
    axes: names of the axes of every leaf of `params`; see `lorax_flax.sharding.mesh`.
    mesh: the devices.
  """

  forward: Forward
  params: PyTree
  axes: meshes.Axes
  mesh: Mesh


@dataclass(frozen=True)
class Program:
  """The steps of one run, and what they take.

  `lorax_flax.train.trials.Program` has the same interface for several runs.

  Attributes:
    step: (state, base, batch) -> (state, metrics), jitted; to be lowered with the mesh
      set.
    eval_step: (state.trained, base, batch) -> (predictions, mean loss), jitted.
    batch: sharding of a training batch.
    start: () -> (state before the first step, base).
    abstract: () -> the same as ShapeDtypeStructs with their shardings.
  """

  step: Any
  eval_step: Any
  batch: jax.sharding.NamedSharding
  start: Callable[[], tuple[TrainState, Base]]
  abstract: Callable[[], tuple[TrainState, Base]]

  places = 1

  def unstack(self, tree: PyTree) -> list[PyTree]:
    """The part of each run in a tree that a step takes or returns."""
    return [tree]

  def full(self, state: TrainState, base: Base, place: int) -> tuple[PyTree, Adapter]:
    """The run's params and adapter, as `lora.apply` takes them."""
    del place
    return base.full(state.trained)

  def evaluated(self, state: TrainState, due: Sequence[bool]) -> Adapter:
    """The first argument of `eval_step`."""
    del due
    return state.trained

  def keep_best(self, state: TrainState, improved: Sequence[bool]) -> TrainState:
    """The state after an evaluation: the best one is kept by its checkpoint."""
    del improved
    return state

  def vacate(self, state: TrainState, place: int) -> TrainState:
    """The state after the run's end."""
    del place
    return state

  def best(
    self, last: TrainState, place: int, run: Any, restored: Callable[[], TrainState]
  ) -> Adapter:
    """The trained leaves of the run's best evaluation, from its checkpoint."""
    del last, place, run
    return restored().trained


def program(
  config: TrainConfig,
  plan: Durations,
  model: Model,
  objective: Objective,
  adapter: Adapter,
) -> Program:
  """The program of one run.

  Args:
    plan: durations that the learning rate follows.
    adapter: arrays, or ShapeDtypeStructs where only `abstract` is called.

  Raises:
    LoraxError: a leaf that no rule says how to shard.
  """
  mesh = model.mesh
  optimizer, rate = optimizer_of(config, plan, adapter)
  placed = states.own(meshes.of_adapter(mesh, model.axes, adapter))

  def create(params, adapter):
    return create_state(params, adapter, optimizer, config.seed)

  state, _ = jax.eval_shape(lambda a: create(None, a), adapter)
  shardings = states.shardings(state, placed, mesh)

  def start():
    own = meshes.place(states.own(adapter), placed)
    state, base = create(read_params(model, adapter), own)
    return meshes.place(state, shardings), base

  def abstract():
    empty = lambda leaf: jax.ShapeDtypeStruct((0,), leaf.dtype)
    params = without_replaced(model.params, adapter, empty)
    state, base = jax.eval_shape(create, params, adapter)
    rest = partition(placed, trainable_mask(placed))[1]
    every = meshes.of_params(mesh, model.axes, model.params)
    replicated = meshes.replicated(mesh)
    bases = Base(without_replaced(every, adapter, lambda _: replicated), rest)
    return meshes.abstract(state, shardings), meshes.abstract(base, bases)

  loss, accumulation = objective.loss, config.accumulation
  step = train_step(
    model.forward, loss, optimizer, rate, accumulation, config.on_nonfinite
  )
  evaluate = eval_step(
    model.forward, objective.eval_loss or loss, objective.predictions
  )
  # Predictions are replicated: every process gets all of them.
  return Program(
    jitted(step, shardings),
    jax.jit(evaluate, out_shardings=meshes.replicated(mesh)),
    meshes.batch(mesh),
    start,
    abstract,
  )


def optimizer_of(
  config: TrainConfig,
  plan: Durations,
  adapter: Adapter,
  own: Mapping[str, Any] | None = None,
) -> tuple[optax.GradientTransformation, Schedule]:
  """The optimiser and its learning rate by step.

  Args:
    adapter: whose methods may have schedules of their own.
    own: fields that replace those of `config`; they may be traced.
  """
  fields = vars(config) | dict(own or {})
  rate = optim.schedule(
    config.schedule, fields["learning_rate"], plan.total, plan.warmup
  )
  names = ("weight_decay", "grad_clip", "lora_plus_ratio")
  reads = optim.OPTIMIZERS[config.optimizer].reads
  chosen = {name: fields[name] for name in (*names, *reads)}
  optimizer = optim.optimizer(rate, name=config.optimizer, **chosen)
  return scheduled(optimizer, adapter), rate


def read_params(model: Model, adapter: Adapter) -> PyTree:
  """The params that a step reads: an empty array where a leaf is trained in full."""
  replicated = meshes.replicated(model.mesh)
  empty = lambda leaf: meshes.place(np.zeros(0, leaf.dtype), replicated)
  return without_replaced(model.params, adapter, empty)


def create_state(
  params: PyTree, adapter: Adapter, optimizer: optax.GradientTransformation, seed: int
) -> tuple[TrainState, Base]:
  """The state before the first step, and the base; keeps their shardings."""
  # Dropout has a stream of its own: the same seed initialises the adapter and orders
  # the examples.
  key = jax.random.fold_in(jax.random.key(seed), 1)
  return states.create(params, adapter, optimizer, key)


def jitted(step: Any, shardings: PyTree | None = None) -> Any:
  """A step (state, …) -> (state, metrics), jitted; the state's buffers are donated.

  Args:
    shardings: of the state, which every next state keeps; None leaves them to the
      compiler.
  """
  if shardings is None:
    return jax.jit(step, donate_argnums=0)
  mesh = jax.tree.leaves(shardings)[0].mesh
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(shardings, meshes.replicated(mesh)),
    compiler_options=_compiler_options(mesh),
  )


def _compiler_options(mesh: Mesh) -> dict[str, int] | None:
  """XLA's options for a step.

  A TPU's compiler splits a product with a sharded kernel into products with its shards,
  which it sends around a ring while it adds up their results in main memory. That
  hides the sending of tensor parallelism. A kernel alone is gathered in less time,
  behind the products before it, and read once.
  """
  if devices.platform(mesh) != "tpu" or mesh.shape["tensor"] > 1:
    return None
  # MiB of an operand from which on products are split.
  return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 2**20}


def train_step(
  forward: Forward,
  loss: Loss,
  optimizer: optax.GradientTransformation,
  rate: Schedule,
  accumulation: int = 1,
  on_nonfinite: str = "stop",
) -> Step:
  """Makes the step as a pure function.

  Args:
    accumulation: number of microbatches, run one after another. Every loss is divided
      by the full batch's weight, so the sum over microbatches is the full batch's
      gradient, whatever the weights in each. Each draws its own dropout.
    on_nonfinite: "skip" leaves the state unchanged where the loss or the gradient is
      not finite; "stop" does not check, and leaves that to the caller.

  Returns:
    (state, base, batch) -> (state, metrics). A batch has the model's inputs, what the
    loss reads (`labels`) and `weights`, each with a leading axis B; an example of
    weight 0 counts nowhere. The metrics stay on the device: loss, gradient norm before
    clipping, learning rate.
  """

  def microbatch_loss(trained, base, batch, weight, key):
    params, adapter = base.full(trained)
    outputs = forward(params, adapter, batch, key)
    value = jnp.sum(loss(outputs, batch) * batch["weights"]) / weight
    return value + penalty(adapter) / accumulation

  def gradients(trained, base, batch, key):
    # Differentiated by the trained leaves alone: no other gradient is formed.
    value_and_grad = jax.value_and_grad(microbatch_loss)
    weight = jnp.sum(batch["weights"])
    keys = jax.random.split(key, accumulation)
    if accumulation == 1:  # No loop around the model: it would hinder XLA for nothing.
      return value_and_grad(trained, base, batch, weight, keys[0])

    def add(sums, microbatch_and_key):
      microbatch, key = microbatch_and_key
      new = value_and_grad(trained, base, microbatch, weight, key)
      return jax.tree.map(jnp.add, sums, new), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
    return jax.lax.scan(add, zeros, (_microbatches(batch, accumulation), keys))[0]

  def step(state: TrainState, base: Base, batch: Batch):
    key = jax.random.fold_in(state.key, state.step)
    value, grads = gradients(state.trained, base, batch, key)
    # Optax mixes types: it raises a decay rate to the power of an integer count.
    with jax.numpy_dtype_promotion("standard"):
      updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    weight = jnp.sum(batch["weights"])
    one, norm = jnp.ones(()), optax.tree.norm(grads)
    metrics = {
      "loss": Mean(value * weight, weight),
      "grad_norm": Mean(norm, one),
      "learning_rate": Mean(rate(state.step), one),
    }
    new = TrainState(trained, opt_state, state.step + 1, state.key)
    if on_nonfinite == "skip":
      new = select(jnp.isfinite(value) & jnp.isfinite(norm), new, state)
    return new, metrics

  return step


def eval_step(
  forward: Forward, loss: Loss, predictions: Predictions = logits
) -> EvalStep:
  """Makes (trained, base, batch) -> (predictions, mean loss), a pure function."""

  def step(trained: Adapter, base: Base, batch: Batch):
    outputs = forward(*base.full(trained), batch, None)
    losses_B = loss(outputs, batch) * batch["weights"]
    weight = jnp.sum(batch["weights"])
    return predictions(outputs), Mean(jnp.sum(losses_B), weight)

  return step


def select(flag: jax.Array, yes: TrainState, no: TrainState) -> TrainState:
  """The one state or the other, by a bool ()."""
  return jax.tree.map(lambda x, y: jax.lax.select(flag, x, y), yes, no)


def _microbatches(batch: Batch, n: int) -> Batch:
  """Microbatches (n, B / n, …) of (B, …): number i has rows i, i + n, …

  Strided, so that every microbatch of a sharded batch is on all devices.
  """
  return {
    name: jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)
    for name, x in batch.items()
  }

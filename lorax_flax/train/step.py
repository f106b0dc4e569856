"""The one training step, and the evaluation step."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lorax_flax.methods import Adapter
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train.losses import Loss
from lorax_flax.train.metrics import Mean
from lorax_flax.train.optim import Schedule
from lorax_flax.train.state import Base, TrainState

PyTree = Any
Array = TypeVar("Array", bound=jax.typing.ArrayLike)
Batch = Mapping[str, jax.Array]
Metrics = dict[str, Mean]

# params, adapter, the model's inputs, key of all dropout or None -> logits_BxC
Forward = Callable[[PyTree, Adapter, Batch, jax.Array | None], jax.Array]

# logits_BxC -> what evaluation keeps of them on the host, (B, …) or None
Predictions = Callable[[jax.Array], jax.Array | None]

Step = Callable[[TrainState, Base, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[Adapter, Base, Batch], tuple[jax.Array | None, Mean]]

# The columns of a batch that are not the model's inputs.
_ASIDE = ("labels", "weights", "index")


def inputs(batch: Mapping[str, Array]) -> dict[str, Array]:
  """The columns of a batch that the model takes."""
  return {name: x for name, x in batch.items() if name not in _ASIDE}


def train_step(
  forward: Forward,
  loss: Loss,
  optimizer: optax.GradientTransformation,
  rate: Schedule,
  accumulation: int = 1,
  shardings: TrainState | None = None,
  on_nonfinite: str = "stop",
) -> Step:
  """Makes the step, jitted; the state's buffers are reused for the next state.

  Args:
    shardings: of the state, so that the next one lies where this one does; without
      them, where the compiler puts it.

  The others, and what it returns, are those of `one_step`.
  """
  step = one_step(forward, loss, optimizer, rate, accumulation, on_nonfinite)
  return jitted(step, shardings)


def jitted(step: Any, shardings: PyTree | None) -> Any:
  """A step (state, …) -> (state, metrics), jitted; arguments as in `train_step`."""
  if shardings is None:
    return jax.jit(step, donate_argnums=0)
  whole = meshes.replicated(jax.tree.leaves(shardings)[0].mesh)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole))


def one_step(
  forward: Forward,
  loss: Loss,
  optimizer: optax.GradientTransformation,
  rate: Schedule,
  accumulation: int = 1,
  on_nonfinite: str = "stop",
) -> Step:
  """Makes the step as a pure function.

  Args:
    accumulation: parts of a batch that go through the model one after another. Every
      loss is divided by the whole batch's weight, so the sum over parts is the whole
      batch's gradient, whatever the weights in each part. The parts draw dropout of
      their own.
    on_nonfinite: "skip" leaves the state as it was where the loss or the gradient is
      not finite; "stop" does not look, and leaves that to the caller.

  Returns:
    (state, base, batch) -> (state, metrics). A batch has the model's inputs, `labels`
    and `weights`, each with a leading axis B; an example of weight 0 counts nowhere.
    The metrics stay on the device: loss, gradient norm before clipping, learning rate.
  """

  def part_loss(trained, base, batch, weight, key):
    logits_BxC = forward(base.params, base.adapter(trained), inputs(batch), key)
    return jnp.sum(loss(logits_BxC, batch["labels"]) * batch["weights"]) / weight

  def gradients(trained, base, batch, key):
    # Differentiated by the trained leaves alone: no other gradient is formed.
    value_and_grad = jax.value_and_grad(part_loss)
    weight = jnp.sum(batch["weights"])
    keys = jax.random.split(key, accumulation)
    if accumulation == 1:  # No loop around the model: it would hinder XLA for nothing.
      return value_and_grad(trained, base, batch, weight, keys[0])

    def add(sums, part):
      new = value_and_grad(trained, base, part[0], weight, part[1])
      return jax.tree.map(jnp.add, sums, new), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
    return jax.lax.scan(add, zeros, (_parts(batch, accumulation), keys))[0]

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


def logits(logits_BxC: jax.Array) -> jax.Array:
  """All of them, float32: see `eval_step`."""
  return logits_BxC.astype(jnp.float32)


def eval_step(
  forward: Forward,
  loss: Loss,
  mesh: Mesh | None = None,
  predictions: Predictions = logits,
) -> EvalStep:
  """Makes (trained, base, batch) -> (predictions of the logits, mean loss), jitted.

  On a mesh every process gets all of the predictions.
  """
  step = one_eval_step(forward, loss, predictions)
  return jax.jit(step, out_shardings=None if mesh is None else meshes.replicated(mesh))


def one_eval_step(
  forward: Forward, loss: Loss, predictions: Predictions = logits
) -> EvalStep:
  """The evaluation step as a pure function."""

  def step(trained: Adapter, base: Base, batch: Batch):
    logits_BxC = forward(base.params, base.adapter(trained), inputs(batch), None)
    losses_B = loss(logits_BxC, batch["labels"]) * batch["weights"]
    weight = jnp.sum(batch["weights"])
    return predictions(logits_BxC), Mean(jnp.sum(losses_B), weight)

  return step


def select(flag: jax.Array, yes: TrainState, no: TrainState) -> TrainState:
  return jax.tree.map(lambda x, y: jax.lax.select(flag, x, y), yes, no)


def _parts(batch: Batch, n: int) -> Batch:
  """(B, …) as (n, B / n, …), part i having rows i, i + n, …

  Strided, so that a batch sharded over devices gives each part to all of them.
  """
  return {
    name: jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)
    for name, x in batch.items()
  }

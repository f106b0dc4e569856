"""The program of a run: its step, and how the state and the base that it takes lie.

The loop and an ahead-of-time compilation both make it here, so that what is compiled
where there are no devices, and no weights, is the very step that trains.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from lorax_flax.adapt.partition import partition, trainable_mask
from lorax_flax.methods import Adapter
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train import optim
from lorax_flax.train import state as states
from lorax_flax.train import step as steps
from lorax_flax.train.config import Durations, TrainConfig
from lorax_flax.train.losses import Loss
from lorax_flax.train.state import Base, TrainState

PyTree = Any


@dataclass(frozen=True)
class Program:
  """The step of a run, and what goes into it.

  Attributes:
    step: (state, base, batch) -> (state, metrics), jitted; to be lowered with the mesh
      set.
    optimizer: whose state the step carries.
    seed: of the step's own random numbers.
    mesh: the devices.
    axes: names of the axes of every leaf of the base.
    adapter: of shardings, the adapter's tree.
    state: of shardings, the state's tree.
  """

  step: Any
  optimizer: optax.GradientTransformation
  seed: int
  mesh: Mesh
  axes: meshes.Axes
  adapter: Adapter
  state: TrainState

  def start(self, params: PyTree, adapter: Adapter) -> tuple[TrainState, Base]:
    """The state before the first step, and the base.

    Args:
      params: the base, which lies on the mesh already.
      adapter: what is trained, anywhere.
    """
    adapter = meshes.place(adapter, self.adapter)
    state, base = create(params, adapter, self.optimizer, self.seed)
    return meshes.place(state, self.state), base

  def abstract(self, params: PyTree, adapter: Adapter) -> tuple[TrainState, Base]:
    """What `start` gives, as ShapeDtypeStructs that say how each leaf lies.

    Args:
      params, adapter: ShapeDtypeStructs or arrays; nothing is computed of them.
    """
    state, base = jax.eval_shape(
      lambda p, a: create(p, a, self.optimizer, self.seed), params, adapter
    )
    rest = partition(self.adapter, trainable_mask(self.adapter))[1]
    lies = Base(meshes.of_params(self.mesh, self.axes, params), rest)
    return meshes.lying(state, self.state), meshes.lying(base, lies)


def make(
  config: TrainConfig,
  plan: Durations,
  *,
  forward: steps.Forward,
  loss: Loss,
  adapter: Adapter,
  mesh: Mesh,
  axes: meshes.Axes,
) -> Program:
  """Makes the step.

  Args:
    plan: the durations that the learning rate follows.
    forward: the adapted model.
    loss: of one example each.
    adapter: arrays or ShapeDtypeStructs; its shapes are all that is looked at.
    mesh: the devices, which may be described only.
    axes: names of the axes of every leaf of the base.

  Raises:
    LoraxError: a leaf that no rule says how to cut.
  """
  optimizer, rate = optimizer_of(config, plan)
  lies = meshes.of_adapter(mesh, axes, adapter)
  state, _ = jax.eval_shape(lambda a: create(None, a, optimizer, config.seed), adapter)
  shardings = states.shardings(state, optimizer, lies, mesh)
  step = steps.train_step(
    forward,
    loss,
    optimizer,
    rate,
    config.accumulation,
    shardings,
    config.on_nonfinite,
  )
  return Program(step, optimizer, config.seed, mesh, axes, lies, shardings)


def optimizer_of(
  config: TrainConfig, plan: Durations, own: Mapping[str, Any] | None = None
) -> tuple[optax.GradientTransformation, optim.Schedule]:
  """The optimiser and its learning rate by step.

  Args:
    own: fields of `config` in the place of its own, that may be traced.
  """
  fields = vars(config) | dict(own or {})
  rate = optim.schedule(
    config.schedule, fields["learning_rate"], plan.total, plan.warmup
  )
  names = ("b1", "b2", "eps", "weight_decay", "grad_clip")
  return optim.adamw(rate, **{name: fields[name] for name in names}), rate


def create(
  params: PyTree, adapter: Adapter, optimizer: optax.GradientTransformation, seed: int
) -> tuple[TrainState, Base]:
  """The state before the first step, and the base, wherever they lie."""
  # Dropout's own stream: the same seed starts the adapter and orders the examples.
  key = jax.random.fold_in(jax.random.key(seed), 1)
  return states.create(params, adapter, optimizer, key)

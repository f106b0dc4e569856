"""A job of shapes: the step that training runs, with no device, weight or example."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

import lorax_flax as lx
from lorax_flax.adapt.paths import flatten
from lorax_flax.adapt.plan import abstract_start
from lorax_flax.jobs import build, outline
from lorax_flax.jobs.settings import Settings
from lorax_flax.models import registry
from lorax_flax.sharding import mesh as meshes
from lorax_flax.tasks import task as tasks
from lorax_flax.train import step as steps
from lorax_flax.train.config import Durations
from lorax_flax.train.state import Base, TrainState

# The learning rate follows numbers of steps, which no shape depends on.
DURATIONS = Durations(total=1000, epoch=1000, warmup=100, save=None)


@dataclass(frozen=True)
class Abstract:
  """A training step and what it takes, as ShapeDtypeStructs with their shardings.

  Attributes:
    step: (state, base, batch) -> (state, metrics), jitted.
    state, base, batch: the step's arguments.
    plan: what is adapted.
    mesh: the devices, which may be described only.
    model: the adapted model's module, config and config.json.
    forward: the adapted function.
    notes: lines for the user: the mesh, what is not sharded, what is trained.
  """

  step: Any
  state: TrainState
  base: Base
  batch: dict[str, jax.ShapeDtypeStruct]
  plan: lx.Plan
  mesh: Mesh
  model: registry.Outline
  forward: steps.Forward
  notes: tuple[str, ...]

  def lower(self) -> Any:
    """The step, traced and lowered for the mesh."""
    with jax.set_mesh(self.mesh):
      return self.step.lower(self.state, self.base, self.batch)

  def compile(self) -> Any:
    """The step, compiled for the mesh."""
    return self.lower().compile()


def abstract(
  settings: Settings, devices: Sequence[jax.Device] | Mesh | AbstractMesh
) -> Abstract:
  """The job that `experiments.run` makes of the same settings, as shapes.

  No checkpoint is read, and no examples but a user's own where the labels are in them:
  a batch is as long as data.max_length allows. The model is that of model.hf_config, or
  else of the config.json of model.path.

  Args:
    devices: the devices of settings.mesh, or the mesh itself. They need not exist;
      with an AbstractMesh there are shardings, and nothing can be lowered.

  Raises:
    LoraxError: settings that do not fit one another, the model or the devices.
  """
  task = tasks.opened(settings.data)
  mesh: Any = devices
  if isinstance(devices, Sequence):
    mesh = meshes.make(settings.mesh, devices)
  build.check_batches(mesh, settings.train)
  max_length = settings.data.max_length
  model = outline.described(settings.model, task, max_length, settings.soft)
  outline.check_tokens(model, max_length, mesh)
  length = build.padded_lengths(np.array([max_length]), 1, model, mesh)[-1]
  rows_B = np.zeros(settings.train.batch_size, np.int64)
  example = task.blank(model, length).batch(rows_B, length)

  axes = build.axes(model)
  params = registry.abstract_params(
    model, settings.model.param_dtype, settings.model.quant
  )
  objective = task.objective(settings.train.label_smoothing)
  lora, forward = build.adapt(model, settings.model, settings.lora, objective)
  plan = lora.plan(params, {name: x[:1] for name, x in example.items()})
  adapter = abstract_start(plan, flatten(params))
  program = steps.program(
    settings.train,
    DURATIONS,
    steps.Model(forward, params, axes, mesh),
    objective,
    adapter,
  )
  state, base = program.abstract()
  batch = meshes.abstract(example, dict.fromkeys(example, program.batch))
  notes = (
    *([meshes.describe(mesh)] if mesh.size > 1 else ()),
    *meshes.not_sharded(mesh, axes, params),
    *build.describe(plan, adapter, params).values(),
  )
  return Abstract(program.step, state, base, batch, plan, mesh, model, forward, notes)

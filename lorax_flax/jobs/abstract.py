"""A job of shapes: the step that training runs, with no device, weight or example."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

import lorax_flax as lx
from lorax_flax.adapt.paths import flatten
from lorax_flax.adapt.plan import start
from lorax_flax.jobs import adapted, shape
from lorax_flax.jobs import build as job
from lorax_flax.jobs.settings import Settings
from lorax_flax.models import registry
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train import program as programs
from lorax_flax.train import step as steps
from lorax_flax.train.config import Durations
from lorax_flax.train.state import Base, TrainState

# The learning rate follows numbers of steps, which no shape depends on.
_DURATIONS = Durations(total=1000, epoch=1000, warmup=100, save=None)


@dataclass(frozen=True)
class Abstract:
  """A training step and what it takes, as ShapeDtypeStructs that say how each lies.

  Attributes:
    step: (state, base, batch) -> (state, metrics), jitted.
    state, base, batch: of the step.
    plan: what is adapted.
    mesh: the devices, which may be described only.
    model: its module, its config, and what its config.json says.
  """

  step: Any
  state: TrainState
  base: Base
  batch: dict[str, jax.ShapeDtypeStruct]
  plan: lx.Plan
  mesh: Mesh
  model: registry.Outline

  def lower(self) -> Any:
    """The step, traced and lowered for the mesh."""
    with jax.set_mesh(self.mesh):
      return self.step.lower(self.state, self.base, self.batch)

  def compile(self) -> Any:
    """The step, compiled for the mesh."""
    return self.lower().compile()


def abstract(
  wanted: Settings,
  devices: Sequence[jax.Device] | Mesh | AbstractMesh,
  say: Callable[[str], None],
) -> Abstract:
  """The job that `job.prepare` makes of the same settings, as shapes.

  Neither a checkpoint nor examples are read: a batch is as long as data.max_length
  allows. The model is what model.hf_config says, or else what the config.json of
  model.path does.

  Args:
    devices: that wanted.mesh is made of, or the mesh itself. They need not be there;
      with an AbstractMesh the shapes lie as they would, and nothing is lowered.
    say: takes a line for the user.

  Raises:
    LoraxError: settings that do not fit one another, the model or the devices.
  """
  kind = job.kind_of(wanted)
  mesh: Any = devices
  if isinstance(devices, Sequence):
    mesh = meshes.make(wanted.mesh, devices)
  job.check_mesh(mesh, wanted, say)
  model = shape.described(wanted, kind)
  length = job.buckets(np.array([wanted.data.max_length]), 1, model)[-1]
  rows_B = np.zeros(wanted.train.batch_size, np.int64)
  example = kind.blank(model, length).batch(rows_B, length)

  logical_axes = model.family.logical_axes(model.module)
  axes = meshes.names_by_path(logical_axes)
  params = registry.abstract_params(model, wanted.model.param_dtype)
  for line in meshes.kept_whole(mesh, axes, params):
    say(line)
  lora, forward = adapted.adapt(model, wanted)
  plan = lora.plan(params, {n: x[:1] for n, x in steps.inputs(example).items()})
  adapter = jax.eval_shape(
    lambda leaves: start(plan, jax.random.key(0), leaves), flatten(params)
  )
  for line in job.describe(adapter, params):
    say(line)
  program = programs.make(
    wanted.train,
    _DURATIONS,
    forward=forward,
    loss=kind.loss,
    adapter=adapter,
    mesh=mesh,
    axes=axes,
  )
  state, base = program.abstract(params, adapter)
  spread = meshes.batch(mesh)
  batch = meshes.lying(example, dict.fromkeys(example, spread))
  return Abstract(program.step, state, base, batch, plan, mesh, model)

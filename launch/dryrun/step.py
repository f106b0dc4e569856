"""A run's step for a slice, as shapes."""

import dataclasses

import jax

from launch.dryrun import jaxpr_flops
from launch.dryrun.topology import Topology
from lorax_flax.jobs import outline
from lorax_flax.jobs.abstract import Abstract, abstract
from lorax_flax.jobs.settings import Settings
from lorax_flax.tasks import task as tasks


def job(wanted: Settings, topology: Topology) -> Abstract:
  """The step that training runs on such a slice; see `lorax_flax.jobs.abstract`."""
  return abstract(wanted, topology.devices)


def experts(wanted: Settings) -> int:
  """How many experts the model has side by side; 1 where it has none."""
  task = tasks.of(wanted.data)
  model = outline.described(wanted.model, task, wanted.data.max_length)
  return getattr(model.config, "num_experts", None) or 1


def useful_flops(wanted: Settings, topology: Topology) -> int:
  """Matmul FLOPs of a step on all chips, were nothing computed twice."""
  model = dataclasses.replace(wanted.model, remat="none")
  once = job(dataclasses.replace(wanted, model=model), topology)
  with jax.set_mesh(once.mesh):
    traced = once.step.trace(once.state, once.base, once.batch)
  return jaxpr_flops.matmul_flops(traced.jaxpr)

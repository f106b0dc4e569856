"""A run's training step for a slice, as shapes, and the FLOPs that it needs."""

import dataclasses

import jax

from launch.dryrun import jaxpr_flops
from launch.dryrun.topology import Topology
from lorax_flax.jobs import outline
from lorax_flax.jobs.abstract import Abstract, abstract
from lorax_flax.jobs.settings import Settings
from lorax_flax.tasks import task as tasks


def job(settings: Settings, topology: Topology) -> Abstract:
  """The step that training runs on a slice; see `lorax_flax.jobs.abstract`."""
  return abstract(settings, topology.devices)


def experts(settings: Settings) -> int:
  """Number of experts of a layer; 1 for a model without experts."""
  task, length = tasks.of(settings.data), settings.data.max_length
  model = outline.described(settings.model, task, length)
  return getattr(model.config, "num_experts", None) or 1


def useful_flops(settings: Settings, topology: Topology) -> int:
  """Matmul FLOPs of a step on all chips together, with nothing recomputed."""
  model = dataclasses.replace(settings.model, remat="none")
  once = job(dataclasses.replace(settings, model=model), topology)
  with jax.set_mesh(once.mesh):
    traced = once.step.trace(once.state, once.base, once.batch)
  return jaxpr_flops.matmul_flops(traced.jaxpr)

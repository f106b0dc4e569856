"""Axes along which a run's model can be sharded, and FLOPs that its step needs."""

import dataclasses

import jax

from launch.dryrun import jaxpr_flops
from launch.dryrun.topology import Topology
from lorax_flax.jobs import outline
from lorax_flax.jobs.abstract import abstract
from lorax_flax.jobs.settings import Settings
from lorax_flax.tasks import task as tasks


def sharded(settings: Settings) -> tuple[int, int | None]:
  """Number of experts of a layer, 1 without; tokens of a row, None if not sharded."""
  task, length = tasks.opened(settings.data), settings.data.max_length
  model = outline.described(settings.model, task, length, settings.soft)
  experts = getattr(model.config, "num_experts", None) or 1
  shards_tokens = model.family.shards_tokens(model.config) and model.soft is None
  return experts, length if shards_tokens else None


def useful_flops(settings: Settings, topology: Topology) -> int:
  """Matmul FLOPs of a step on all chips together, with nothing recomputed."""
  model = dataclasses.replace(settings.model, remat="none")
  once = abstract(dataclasses.replace(settings, model=model), topology.devices)
  with jax.set_mesh(once.mesh):
    traced = once.step.trace(once.state, once.base, once.batch)
  return jaxpr_flops.matmul_flops(traced.jaxpr)

"""A run's step for a slice, as shapes."""

import dataclasses
from collections.abc import Callable

import jax

from experiments import cli, shape
from experiments.abstract import Abstract, abstract
from experiments.job import kind_of
from experiments.settings import Settings
from launch import needed
from launch.topology import Topology


def job(wanted: Settings, topology: Topology, say: Callable[[str], None]) -> Abstract:
  """The step that training runs on such a slice; see `experiments.abstract`."""
  return abstract(wanted, topology.devices, say)


def experts(wanted: Settings) -> int:
  """How many experts the model has side by side; 1 where it has none."""
  model = shape.described(wanted, kind_of(wanted))
  return getattr(model.config, "num_experts", None) or 1


def useful_flops(wanted: Settings, topology: Topology) -> int:
  """Matmul FLOPs of a step on all chips, were nothing computed twice."""
  model = dataclasses.replace(wanted.model, remat="none")
  once = job(dataclasses.replace(wanted, model=model), topology, cli.silent)
  with jax.set_mesh(once.mesh):
    traced = once.step.trace(once.state, once.base, once.batch)
  return needed.matmul_flops(traced.jaxpr)

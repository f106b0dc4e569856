"""A run's step for a slice, as shapes."""

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments.abstract import Abstract, abstract

from experiments.settings import Settings
from launch import costs
from launch.topology import Topology


def job(wanted: Settings, topology: Topology, say: Callable[[str], None]) -> Abstract:
  """The step that training runs on such a slice; see `experiments.abstract`."""
  return abstract(wanted, topology.devices, say)


def useful_flops(wanted: Settings, topology: Topology) -> int:
  """Matmul FLOPs of a step on all chips, were nothing computed twice."""
  model = dataclasses.replace(wanted.model, remat="none")
  silent: Callable[[Any], None] = lambda line: None
  return costs.useful_flops(
    job(dataclasses.replace(wanted, model=model), topology, silent)
  )

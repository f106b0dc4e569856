"""Rooflines of the training step of one trial, and of several together.

  python -m benchmarks.sweep_roofline [--topology=v5e:1x1] [--batches 1 2] [--trials=8]

The quick start's step with small batches, of one trial and of several together, is
compiled by the TPU's own compiler with no TPU (libtpu is needed). Times are
`launch.dryrun`'s rooflines; the speed-up is the ratio of one after another to together.
As in training, only as many trials run at once as fit into the chip's cache; the others
follow them.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common
from experiments.cli import config_dict, config_flag
from launch.dryrun import hlo, report, topology
from lorax_flax.data.pipeline import LENGTH, Cut
from lorax_flax.jobs import settings
from lorax_flax.jobs.abstract import DURATIONS, Abstract, abstract
from lorax_flax.sharding import mesh as meshes
from lorax_flax.tasks import task as tasks
from lorax_flax.train import step as steps
from lorax_flax.train import trials
from lorax_flax.train.state import Base, TrainState


def together(one: Abstract, requested: settings.Settings, n: int) -> Abstract:
  """The step of n trials, from that of one."""
  objective = tasks.opened(requested.data).objective(requested.train.label_smoothing)
  weights = one.batch["weights"]
  length = jax.ShapeDtypeStruct(weights.shape, jnp.int32, sharding=weights.sharding)
  state, base, batch = _stacked(one.state, one.base, {**one.batch, LENGTH: length}, n)
  step = trials.train_step(
    one.forward,
    objective,
    requested.train,
    DURATIONS,
    trials.within(trials.ROOM),
    Cut((), ()),
  )
  shardings = jax.tree.map(lambda x: x.sharding, state)
  jitted = steps.jitted(step, shardings)
  return dataclasses.replace(one, step=jitted, state=state, base=base, batch=batch)


def _stacked(
  state: TrainState, base: Base, batch: Mapping[str, Any], n: int
) -> tuple[trials.States, trials.Bases, dict[str, Any]]:
  """ShapeDtypeStructs that N trials' step takes, from those of one's step."""

  def stack(tree):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        (n, *x.shape), x.dtype, sharding=trials.sharding(x.sharding)
      ),
      tree,
    )

  replicated = meshes.replicated(jax.tree.leaves(base)[0].sharding.mesh)
  own, shared = trials.own_and_shared(base.rest)
  number: Any = jax.ShapeDtypeStruct((n,), jnp.float32, sharding=replicated)
  alive = jax.ShapeDtypeStruct((n,), jnp.bool_, sharding=replicated)
  each = stack(state)
  return (
    trials.States(each, each.trained, alive),  # type: ignore[arg-type]
    trials.Bases(
      Base(base.params, shared), stack(own), dict.fromkeys(trials.NUMBERS, number)
    ),
    stack(dict(batch)),
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", default="quickstart.py")
  parser.add_argument("--topology", default="v5e:1x1")
  parser.add_argument(
    "--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="examples of a trial"
  )
  parser.add_argument("--trials", type=int, default=8)
  found = parser.parse_args()
  slice_ = topology.describe(found.topology)
  rows = []
  for batch in found.batches:
    one = 0.0
    for n in (1, found.trials):
      products, traffic, peak = measure(found.config, slice_, batch, n)
      step = max(products, traffic)
      one = one or step
      times = [f"{1e3 * x:.3f}" for x in (products, traffic, step, step / n)]
      speedup = f"{n * one / step:.2f}" if n > 1 else ""
      rows.append([f"{n} of batch {batch}", *times, report.size(peak), speedup])
  header = [
    "trials",
    "products ms",
    "HBM ms",
    "step ms",
    "a trial ms",
    "HBM",
    "speed-up",
  ]
  print(common.table(f"{found.config} on {found.topology}", header, rows))
  print(common.repeat())


def measure(
  config: str, slice_: topology.Topology, batch: int, n: int
) -> tuple[float, float, float]:
  """Seconds of a step's products and of its memory traffic, and bytes of its memory.

  Args:
    batch: examples of each trial.
    n: number of trials.
  """
  fields = config_flag.load(config)
  fields.train.batch_size = batch
  requested = config_dict.convert(fields)
  one = abstract(requested, slice_.devices)
  step = one if n == 1 else together(one, requested, n)
  with topology.quiet():
    compiled = step.compile()
  text, memory = compiled.as_text(), compiled.memory_analysis()
  products = hlo.matmul_flops(text) / slice_.chip.flops
  traffic = hlo.hbm_bytes(text) / slice_.chip.hbm_bandwidth
  return products, traffic, memory.argument_size_in_bytes + memory.temp_size_in_bytes


if __name__ == "__main__":
  main()

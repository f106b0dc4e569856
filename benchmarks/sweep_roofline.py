"""What a chip gains by trials that train together: the dry run's roofline of the step.

  python -m benchmarks.sweep_roofline [--topology=v5e:1x1] [--batches 1 2] [--trials=8]

The quick start's step with small batches, of one trial and of several together, is
compiled by the TPU's own compiler with no TPU (libtpu is needed). Times are
`launch.dryrun`'s rooflines; the gain is how much longer the trials take one after
another. As in training, no more trials go through the model at once than the chip's
cache has room for; the others follow them.
"""

import argparse
import dataclasses

import jax

from benchmarks import common
from experiments.cli import config_flag
from launch.dryrun import hlo, report, topology
from launch.dryrun import step as shapes
from lorax_flax.jobs import settings
from lorax_flax.jobs.abstract import DURATIONS, Abstract
from lorax_flax.tasks import task as tasks
from lorax_flax.train import stacked
from lorax_flax.train import step as steps


def together(one: Abstract, wanted: settings.Settings, n: int) -> Abstract:
  """The step of n trials, from that of one."""
  objective = tasks.of(wanted.data).objective(wanted.train.label_smoothing)
  state, base, batch = stacked.abstract(one.state, one.base, one.batch, n)
  step = stacked.train_step(
    one.forward, objective, wanted.train, DURATIONS, stacked.within(stacked.ROOM)
  )
  shardings = jax.tree.map(lambda x: x.sharding, state)
  jitted = steps.jitted(step, shardings)
  return dataclasses.replace(one, step=jitted, state=state, base=base, batch=batch)


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
      gain = f"{n * one / step:.2f}" if n > 1 else ""
      rows.append([f"{n} of batch {batch}", *times, report.size(peak), gain])
  header = ["trials", "products ms", "HBM ms", "step ms", "a trial ms", "HBM", "gain"]
  print(common.table(f"{found.config} on {found.topology}", header, rows))


def measure(
  config: str, slice_: topology.Topology, batch: int, n: int
) -> tuple[float, float, float]:
  """Of a step of n trials with so many examples each: seconds of the products and of
  the memory traffic, and bytes of memory."""
  fields = config_flag.load(config)
  fields.train.batch_size = batch
  wanted = settings.convert(fields)
  one = shapes.job(wanted, slice_)
  step = one if n == 1 else together(one, wanted, n)
  with topology.quiet():
    compiled = step.compile()
  text, memory = compiled.as_text(), compiled.memory_analysis()
  products = hlo.matmul_flops(text) / slice_.chip.flops
  traffic = hlo.hbm_bytes(text) / slice_.chip.hbm_bandwidth
  return products, traffic, memory.argument_size_in_bytes + memory.temp_size_in_bytes


if __name__ == "__main__":
  main()

"""What a chip gains by trials that train together: the dry run's roofline of the step.

  python -m benchmarks.sweep_roofline [--topology=v5e:1x1] [--batch=1] [--trials=8]

The quick start's step with small batches, of one trial and of several together, is
compiled by the TPU's own compiler with no TPU (libtpu is needed). A roofline is the
longest of what the products and the memory traffic take at the chip's peak rates; what
chips send each other is left out.
"""

import argparse
import dataclasses

import jax

from benchmarks import common
from experiments import configuration, job, settings, shape
from experiments.abstract import Abstract
from experiments.adapted import adapt
from launch import hlo, shapes, topology
from lorax_flax.train import mesh as meshes
from lorax_flax.train import stacked
from lorax_flax.train.config import Durations

_PLAN = Durations(total=1000, epoch=1000, warmup=100, save=None)


def together(one: Abstract, wanted: settings.Settings, n: int) -> Abstract:
  """The step of n trials, from that of one."""
  kind = job.kind_of(wanted)
  _, forward = adapt(shape.described(wanted, kind), wanted)
  state, base, batch = stacked.abstract(one.state, one.base, one.batch, n)
  step = stacked.train_step(forward, kind.loss, wanted.train, _PLAN, n)
  lies = jax.tree.map(lambda x: x.sharding, state)
  jitted = jax.jit(
    step, donate_argnums=0, out_shardings=(lies, meshes.replicated(one.mesh))
  )
  return dataclasses.replace(one, step=jitted, state=state, base=base, batch=batch)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", default="quickstart.py")
  parser.add_argument("--topology", default="v5e:1x1")
  parser.add_argument("--batch", type=int, default=1, help="examples of each trial")
  parser.add_argument("--trials", type=int, default=8)
  found = parser.parse_args()
  slice_ = topology.describe(found.topology)
  config = configuration.load(found.config)
  config.train.batch_size = found.batch
  wanted = settings.convert(config)
  one = shapes.job(wanted, slice_, lambda line: None)
  rows, seconds = [], []
  for name, count in (("one trial", 1), (f"{found.trials} together", found.trials)):
    step = one if count == 1 else together(one, wanted, count)
    with topology.quiet():
      compiled = step.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    products = hlo.matmul_flops(text) / slice_.chip.flops
    traffic = hlo.hbm_bytes(text) / slice_.chip.hbm_bandwidth
    seconds.append(max(products, traffic) / count)
    parts = (products, traffic, max(products, traffic), seconds[-1])
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    rows.append([name, *(f"{x * 1e3:.3f}" for x in parts), f"{peak / 1e6:,.0f}"])
  header = ["step", "products ms", "HBM ms", "step ms", "a trial ms", "memory MB"]
  print(common.table(f"{found.config} on {found.topology}", header, rows))
  print(f"a trial takes {seconds[0] / seconds[1]:.2f} times as long alone")


if __name__ == "__main__":
  main()

"""The roofline's gain of trials that train together, on a TPU that is not there.

  python -m benchmarks.trials [--topology=v5e:1x1] [--trials=8] [--length=128]
  python -m benchmarks.trials --layers=24 --hidden=2048 --length=32 --batches 1 4

A small batch does not keep a chip busy: a step reads every frozen weight for a few
tokens. Trials in one program read them once for all. For each batch size, the step of
one trial and the step of all of them, vmapped over state and batch with the base held
once, are compiled for the slice. Times are `launch.dryrun`'s rooflines, and the gain
is how much shorter all trials take together than one after another.
"""

import argparse
import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import common
from launch import costs, report
from launch import topology as topologies
from lorax_flax.train import mesh as meshes


def together(job: common.Job, trials: int) -> Any:
  """The job of so many trials, in one step."""

  def stacked(x):
    spec = PartitionSpec(None, *x.sharding.spec)
    lies = NamedSharding(x.sharding.mesh, spec)
    return jax.ShapeDtypeStruct((trials, *x.shape), x.dtype, sharding=lies)

  step = jax.jit(jax.vmap(job.step, in_axes=(0, None, 0)), donate_argnums=0)
  state, batch = jax.tree.map(stacked, (job.state, job.batch))
  return SimpleNamespace(
    step=step, state=state, base=job.base, batch=batch, mesh=job.mesh
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--topology", default="v5e:1x1")
  parser.add_argument("--trials", type=int, default=8)
  parser.add_argument("--length", type=int, default=128)
  parser.add_argument("--layers", type=int, default=12)
  parser.add_argument("--hidden", type=int, default=768, help="a multiple of 64")
  parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
  args = parser.parse_args()
  where = topologies.describe(args.topology)
  mesh = meshes.make(meshes.MeshConfig(), where.devices)
  rows = []
  wide = {"hidden": args.hidden, "heads": args.hidden // 64, "mlp": 4 * args.hidden}
  shape = common.Shape(layers=args.layers, length=args.length, **wide)
  for batch in args.batches:
    shape = dataclasses.replace(shape, batch=batch)
    job = common.job(
      shape, "all_linear", dtype="bfloat16", scan=True, abstract=True, mesh=mesh
    )
    one, _ = costs.measure(job, where, 0.0)
    all_, _ = costs.measure(together(job, args.trials), where, 0.0)
    gain = args.trials * one.seconds / all_.seconds
    times = (report.time(one.seconds), one.bound, report.time(all_.seconds), all_.bound)
    rows.append((batch, *times, f"{gain:.2f}", report.size(all_.peak)))
  model = f"{args.layers} layers, {args.hidden} wide"
  title = f"{args.trials} trials of {model}, on {args.topology}, bfloat16"
  header = ("batch", *("one", "bound", "all", "bound", "gain", "peak HBM"))
  print(common.table(f"{title}, {args.length} tokens", header, rows))


if __name__ == "__main__":
  main()

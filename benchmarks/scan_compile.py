"""Compile time of a training step by its number of layers, scanned and looped.

  python -m benchmarks.scan_compile
  python -m benchmarks.scan_compile --topology=v5e:2x2

Scanned layers are one body for any number of layers; looped layers are one copy each.
Measured in processor seconds of all threads, tracing and compiling, so that other
programs hardly matter, each in a fresh process. Widths are small, since compile time
depends on the number of operations more than on their sizes. With --topology the
compiler is a TPU's, and no TPU is needed.
"""

import argparse
import json
import subprocess
import sys
import time

from benchmarks import common

LAYERS = (12, 32, 80)


def measure(layers: int, scan: bool, topology: str | None) -> tuple[float, float]:
  """Processor seconds of tracing and of compiling, in this process."""
  mesh = None
  if topology is not None:
    from launch.dryrun import topology as topologies
    from lorax_flax.sharding import mesh as meshes

    slice_ = topologies.describe(topology)
    mesh = meshes.make(meshes.MeshConfig(data=1, fsdp=slice_.size), slice_.devices)
  shape = common.Shape(layers, 256, 4, 1024, 1024, batch=8, length=128)
  # Imports and set-up happen once per process, and are not measured.
  warm = common.Shape(1, 64, 4, 64, 64, batch=8, length=16)
  common.job(warm, "all_linear", scan=True, abstract=True, mesh=mesh).lower()
  start = time.process_time()
  job = common.job(shape, "all_linear", scan=scan, abstract=True, mesh=mesh)
  lowered = job.lower()
  traced = time.process_time()
  lowered.compile()
  return traced - start, time.process_time() - traced


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--topology", help="a TPU slice; without it, this processor")
  parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.one:
    layers, scan = args.one
    print(json.dumps(measure(layers, bool(scan), args.topology)))
    return
  rows = []
  for layers in LAYERS:
    found = []
    for scan in (1, 0):
      command = [sys.executable, "-m", "benchmarks.scan_compile"]
      command += [f"--topology={args.topology}"] if args.topology else []
      done = subprocess.run(
        [*command, "--one", str(layers), str(scan)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
      )
      found += json.loads(done.stdout)
    rows.append((f"{layers} layers", *(f"{x:,.1f}" for x in found)))
  where = args.topology or "this processor"
  title = f"Seconds of processor time for a step of an encoder, 256 wide, on {where}"
  header = ("", *("scanned: trace", "compile"), *("looped: trace", "compile"))
  print(common.table(title, header, rows))
  print(common.repeat())


if __name__ == "__main__":
  main()

"""Bytes that devices send in a training step, LoRA's against full fine-tuning's.

  python -m benchmarks.collectives

Read from the compiled step of RoBERTa-base's shape on eight virtual devices, for some
meshes: the number of collectives of each kind that run, and the bytes that each device
sends, by the usual ring algorithms (see `hlo.Collective.sent`). The compiler is the
CPU's. Another backend packs and orders collectives in its own way, but has as much to
send, or less if it turns an all-reduce with a slice into a reduce-scatter.
"""

import argparse
from collections import Counter

import jax

from benchmarks import common
from benchmarks.common import Shape
from launch.dryrun import hlo
from lorax_flax.sharding import mesh as meshes

# Twelve heads can be sharded over four devices, not over eight.
MESHES = ((8, 1, 1), (1, 8, 1), (2, 1, 4), (2, 2, 2))


def measure(shape: Shape, method: str, sizes: tuple[int, int, int]) -> Counter[str]:
  """Bytes that each device sends in a step, by kind; the number of runs as "n KIND"."""
  mesh = meshes.make(meshes.MeshConfig(*sizes))
  text = common.job(shape, method, abstract=True, mesh=mesh).compile().as_text()
  found: Counter[str] = Counter()
  for c in hlo.collectives(text):
    found[c.kind] += round(c.sent)
    found[f"n {c.kind}"] += c.times
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--layers", type=int, default=common.ROBERTA_BASE.layers)
  args = parser.parse_args()
  jax.config.update("jax_num_cpu_devices", 8)
  shape = Shape(layers=args.layers)
  kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
  rows = []
  for sizes in MESHES:
    full = 0
    for method in ("full", "query_value", "all_linear"):
      found = measure(shape, method, sizes)
      sent = sum(n for kind, n in found.items() if not kind.startswith("n "))
      full = full or sent
      each = (f"{found[k] / 1e6:,.1f} ({found['n ' + k]})" for k in kinds)
      name = " × ".join(map(str, sizes))
      rows.append((name, method, *each, f"{sent / 1e6:,.1f}", f"{sent / full:.4f}"))
  title = (
    f"{shape}\nMB that each of eight devices sends in a step (collectives that run)"
  )
  header = ("data × fsdp × tensor", "method", *kinds, "sum", "of full")
  print(common.table(title, header, rows))
  print(common.repeat())


if __name__ == "__main__":
  main()

"""Matmul FLOPs of the LoRA step, over the minimum.

  python -m benchmarks.flops

The floor is the forward pass, the gradients of all inputs, and the deltas' own
products; no gradient of a frozen kernel. The strict floor also leaves out the gradients
below the lowest trained weight; a scan, whose body is the same for every layer, cannot.
The figures come from the compiled program, loops multiplied out.
"""

import argparse

from benchmarks import common
from benchmarks.common import Shape
from launch.dryrun import hlo


def floor(shape: Shape, plan, *, strict: bool) -> int:
  """Minimum of one step's matmul FLOPs: an encoder with deltas and a trained head."""
  tokens, d, f = shape.batch * shape.length, shape.hidden, shape.mlp
  kernels = {"query": (d, d), "key": (d, d), "value": (d, d)}
  kernels |= {"attention/output": (d, d), "intermediate": (d, f), "output": (f, d)}
  adapted = {_kernel(t.path) for t in plan.targets}
  products = 2 * tokens * shape.length * d  # of scores, and of weights with values
  total = 0
  for layer in range(shape.layers):
    # True if a trained weight is below this layer's input.
    below = layer > 0 or not strict
    for name, (n_in, n_out) in kernels.items():
      product = 2 * tokens * n_in * n_out
      attends = name in ("query", "key", "value")
      total += product * (2 if below or not attends else 1)
      if name in adapted:
        x_a, xa_b = 2 * tokens * n_in * shape.rank, 2 * tokens * shape.rank * n_out
        total += 3 * xa_b + (3 if below or not attends else 2) * x_a
    # Scores and mixing forward; the gradients of weights, values, queries and keys.
    # Without a trained weight behind the first layer's keys, theirs is not needed.
    total += products * (2 + 4 - (not below and "key" not in adapted))
  rows = shape.batch
  head = 2 * rows * d * d + 2 * rows * d * 2
  return total + 3 * head


def _kernel(path: str) -> str:
  name = path.removesuffix("/kernel").split("/")[-1]
  return "attention/output" if path.endswith("attention/output/kernel") else name


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--layers", type=int, default=common.ROBERTA_BASE.layers)
  args = parser.parse_args()
  shape = Shape(layers=args.layers)
  rows = []
  for method in ("query_value", "all_linear"):
    for scan in (False, True):
      job = common.job(shape, method, scan=scan, abstract=True)
      got = hlo.matmul_flops(job.compile().as_text())
      least, strictly = (floor(shape, job.plan, strict=s) for s in (False, True))
      numbers = (f"{n / 1e9:,.1f}" for n in (got, least, strictly))
      ratios = (f"{got / n:.4f}" for n in (least, strictly))
      rows.append((f"{method}{', scanned' if scan else ''}", *numbers, *ratios))
  title = f"{shape}\nMatmul FLOPs of one step, in 10^9"
  header = ("method", "compiled", "floor", "strict floor", "ratio", "strict ratio")
  print(common.table(title, header, rows))
  print(common.repeat())


if __name__ == "__main__":
  main()

"""Memory of the compiled LoRA step over that of full fine-tuning, the same model.

  python -m benchmarks.memory

Arguments, results and temporaries by the compiler's memory analysis. A result that
replaces a donated argument counts once.
"""

import argparse

from benchmarks import common
from benchmarks.common import Shape


def memory(compiled) -> dict[str, int]:
  """Bytes by kind, and their sum."""
  m = compiled.memory_analysis()
  parts = {
    "arguments": m.argument_size_in_bytes,
    "outputs": m.output_size_in_bytes - m.alias_size_in_bytes,
    "temporaries": m.temp_size_in_bytes,
  }
  return parts | {"total": sum(parts.values())}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--layers", type=int, default=common.ROBERTA_BASE.layers)
  parser.add_argument("--dropout", type=float, default=0.0)
  args = parser.parse_args()
  shape = Shape(layers=args.layers, dropout=args.dropout)
  found = {
    method: memory(common.job(shape, method, abstract=True).compile())
    for method in common.METHODS
  }
  full = found["full"]["total"]
  rows = [
    (
      method,
      *(f"{n / 1e6:,.0f}" for n in parts.values()),
      f"{parts['total'] / full:.3f}",
    )
    for method, parts in found.items()
  ]
  title = f"{shape}\nMemory of the compiled step, in MB"
  header = ("method", "arguments", "outputs", "temporaries", "total", "of full")
  print(common.table(title, header, rows))
  print(common.repeat())


if __name__ == "__main__":
  main()

"""Third-party models under the transform: a row each, or the refusal's text.

  python -m benchmarks.third_party [NAME…]

NAMEs are frameworks (linen, nnx, …) or models (nnx/mamba2). The libraries come with the
extra `third_party`; a model whose library is missing is said so.
"""

import argparse
import importlib
import importlib.metadata

from benchmarks import common
from benchmarks.third_party import FRAMEWORKS, LIBRARIES
from benchmarks.third_party.check import HEADER, cells
from lorax_flax import text_table
from lorax_flax.errors import unknown


def models() -> tuple[dict, list[str]]:
  """Name to builder, and what is not installed."""
  found, missing = {}, []
  for framework in FRAMEWORKS:
    try:
      module = importlib.import_module(f"benchmarks.third_party.{framework}")
    except ImportError as e:
      missing.append(f"{framework}: {e}")
    else:
      found |= {f"{framework}/{name}": build for name, build in module.MODELS.items()}
  return found, missing


def versions() -> str:
  """The libraries that are installed, with their versions."""
  found = []
  for name in LIBRARIES:
    try:
      found.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
      found.append(f"{name} not installed")
  return ", ".join(found)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", metavar="NAME")
  names = parser.parse_args().names
  found, missing = models()
  for name in names:
    if name not in {*found, *FRAMEWORKS}:
      raise SystemExit(unknown("model", name, [*FRAMEWORKS, *found]))
  rows = []
  for name, build in found.items():
    if not names or name in names or name.split("/")[0] in names:
      try:
        rows.append((name, *cells(build)))
      except ImportError as e:
        missing.append(f"{name}: {e}")
  print(text_table.render(HEADER, rows, align="lrrrrrrl"))
  for line in missing:
    print(f"not installed: {line}")
  print(f"{versions()}\n{common.repeat()}")


if __name__ == "__main__":
  main()

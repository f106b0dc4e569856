"""Reads what the repository's files import, without importing them."""

import ast
import functools
import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Packages and folders of the repository; a file in `tests` may import any of them.
OURS = ("lorax_flax", "experiments", "launch", "benchmarks", "examples", "tests")


def files(*folders: str) -> list[Path]:
  """Python files of these folders of the repository, nested ones included, sorted."""
  return sorted(path for name in folders for path in (ROOT / name).rglob("*.py"))


def module(path: Path) -> str:
  """Dotted module name of a file of the repository."""
  return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(
    ".__init__"
  )


def file_of(name: str) -> Path | None:
  """File of a dotted name that starts in the repository, or of its closest parent."""
  parts = name.split(".")
  if parts[0] not in OURS:
    return None
  while parts:
    path = ROOT.joinpath(*parts)
    for found in (path.with_suffix(".py"), path / "__init__.py"):
      if found.is_file():
        return found
    parts.pop()
  return None


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
  """Dotted names that a file imports: "jax.numpy", "lorax_flax.errors.unknown"."""
  found = []
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
      found += [f"{node.module}.{alias.name}" for alias in node.names]
  return tuple(found)


@functools.cache
def _is_installed(package: str) -> bool:
  return package in OURS or importlib.util.find_spec(package) is not None


def missing(path: Path) -> set[str]:
  """Packages that are not installed, of those that a test file imports.

  Files of the tests and of the benchmarks that it imports count as well.
  """
  seen, todo, found = set(), [path], set()
  while todo:
    here = todo.pop()
    seen.add(here)
    for name in imports(here):
      package = name.split(".")[0]
      if not _is_installed(package):
        found.add(package)
      other = file_of(name) if package in ("tests", "benchmarks") else None
      if other is not None and other not in seen:
        todo.append(other)
  return found

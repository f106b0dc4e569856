"""Imports point down only."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW = {"methods": 0, "adapt": 1, "models": 2, "hub": 2, "data": 2, "train": 3}
FILES = sorted((ROOT / "lorax_flax").glob("*/*.py"))


def imported(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_a_package_imports_nothing_above_it(path):
  for name in imported(path):
    assert not name.startswith(("experiments", "launch", "ml_collections")), name
    parts = name.split(".")
    if parts[0] == "lorax_flax" and len(parts) > 1 and parts[1] in BELOW:
      assert BELOW[parts[1]] <= BELOW[path.parent.name], name


# What tests/run installs beside the newest JAX, where the transform's tests run alone.
NEWEST = {"jax", "flax", "optax", "numpy", "pytest", "lorax_flax"}


@pytest.mark.parametrize("path", sorted((ROOT / "tests/adapt").glob("*.py")))
def test_the_transforms_tests_need_no_peer(path):
  own = ("tests.adapt.", "tests.methods.layers")
  for name in imported(path):
    known = name.split(".")[0] in NEWEST | sys.stdlib_module_names
    assert known or name.startswith(own), name

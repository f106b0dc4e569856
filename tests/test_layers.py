"""Imports point down only, from room to room, and never in a circle."""

import functools
import graphlib
import sys

import pytest

from tests import imports

# Rooms from the bottom up; a room imports itself and rooms below it.
ROOMS = (
  "lorax_flax.version",
  "lorax_flax.errors",
  "lorax_flax.devices",
  "lorax_flax.nodes",
  "lorax_flax.ragged",
  "lorax_flax.text_table",
  "lorax_flax.html_page",
  "lorax_flax.metrics",
  "lorax_flax.files",
  "lorax_flax.distributed",
  "lorax_flax.quant",
  "lorax_flax.methods",
  "lorax_flax.adapt",
  "lorax_flax.sharding",
  "lorax_flax.hub",
  "lorax_flax.models",
  "lorax_flax.data",
  "lorax_flax.serve",
  "lorax_flax.train",
  "lorax_flax",
  "lorax_flax.tasks",
  "lorax_flax.jobs",
  "experiments",
  "launch",
  "benchmarks",
  "examples",
)
FOLDERS = ("lorax_flax", "experiments", "launch", "benchmarks", "examples")
FILES = imports.files(*FOLDERS)

# What reads ConfigDicts, and what may import JAX's private modules.
CONFIG_DICTS = ("experiments.cli", "experiments.configs")
PRIVATE_JAX = "lorax_flax.distributed.coordinator"
ENCODING = "lorax_flax.adapt.interpret.encoding"


def within(name, *rooms):
  return any(name == room or name.startswith(f"{room}.") for room in rooms)


def room(module):
  """The room of a module; `lorax_flax` alone is the package's front page."""
  parts = module.split(".")
  name = ".".join(parts[:2]) if parts[0] == "lorax_flax" else parts[0]
  assert name in ROOMS, f"{module} is in no room of ROOMS"
  return name


@functools.cache
def ours(path):
  """Modules of the repository that a file imports."""
  files = map(imports.file_of, imports.imports(path))
  return {imports.module(file) for file in files if file is not None}


@pytest.mark.parametrize("path", FILES, ids=imports.module)
def test_a_module_imports_nothing_above_it(path):
  here = room(imports.module(path))
  above = ROOMS[ROOMS.index(here) + 1 :]
  wrong = sorted(name for name in ours(path) if room(name) in above)
  assert not wrong, f"{here} is below these: {wrong}"


def test_no_modules_import_each_other_in_a_circle():
  graph = {imports.module(path): ours(path) for path in FILES}
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("path", FILES, ids=imports.module)
def test_only_one_place_imports_what_is_private_or_for_commands(path):
  name = imports.module(path)
  for imported in imports.imports(path):
    assert not within(imported, "jax._src") or name == PRIVATE_JAX, imported
    assert not within(imported, "ml_collections") or within(name, *CONFIG_DICTS)


@pytest.mark.parametrize("path", imports.files("lorax_flax/adapt"), ids=imports.module)
def test_only_one_file_reads_the_parameters_of_equations(path):
  if imports.module(path) != ENCODING:
    text = path.read_text(encoding="utf-8")
    assert ".params" not in text.replace("self.params", "")


# What the transform's tests need beside the standard library.
PLAIN = {"jax", "flax", "equinox", "haiku", "optax", "numpy", "pytest", "lorax_flax"}


@pytest.mark.parametrize("path", imports.files("tests/adapt"), ids=imports.module)
def test_the_transforms_tests_need_no_peer(path):
  own = ("tests.adapt", "tests.compiles", "tests.methods.layers")
  for name in imports.imports(path):
    known = name.split(".")[0] in PLAIN | sys.stdlib_module_names
    assert known or within(name, *own), name

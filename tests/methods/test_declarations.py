"""A method alone knows its leaves: the rest of the project derives what it needs."""

import ast
from pathlib import Path

import pytest

import lorax_flax as lx

ROOT = Path(__file__).parents[2]
LEAVES = {name for method in lx.METHODS.values() for name in method.axes}
# Words that other things have too: they count where a delta is spoken of.
COMMON = {"bias", "rows", "scale", "value"}
DELTAS = {"d", "delta", "other"}
# Its fields are those of `Parts`, not a delta's.
VIEWS = "lorax_flax/adapt/interpret/"


def _users():
  """The modules outside the package's methods that import from them."""
  for room in ("lorax_flax", "experiments", "launch"):
    for file in sorted((ROOT / room).rglob("*.py")):
      name = file.relative_to(ROOT).as_posix()
      if name.startswith(("lorax_flax/methods/", VIEWS)):
        continue
      if "lorax_flax.methods" in (text := file.read_text()):
        yield name, ast.parse(text)


def _named(tree):
  """Leaves and classes of single methods that a module names, with their lines."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and node.attr in LEAVES:
      of = getattr(node.value, "id", None)
      if node.attr not in COMMON or of in DELTAS:
        yield node.lineno, node.attr
    elif isinstance(node, ast.Constant) and node.value in LEAVES - COMMON:
      yield node.lineno, node.value
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("replace"):
      if node.args and getattr(node.args[0], "id", None) in DELTAS:
        yield from ((node.lineno, k.arg) for k in node.keywords if k.arg in LEAVES)
    elif isinstance(node, ast.Name) and node.id in ("BiasLoRA", "DoRA", "LowRank"):
      yield node.lineno, node.id


def test_nothing_else_names_a_methods_leaves():
  users = dict(_users())
  assert len(users) > 10
  found = {name: sorted({*_named(tree)}) for name, tree in users.items()}
  assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
  "source",
  [
    "delta.scale",
    "x.magnitude",
    "getattr(delta, 'a')",
    "replace(delta, value=1)",
    "isinstance(x, DoRA)",
  ],
)
def test_the_search_finds_what_it_is_for(source):
  assert [*_named(ast.parse(source))]

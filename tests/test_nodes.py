"""Nodes of pytrees: no class is taken for another one."""

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

import jax
import pytest
from jax.tree_util import GetAttrKey

import lorax_flax as lx
from lorax_flax import quant
from lorax_flax.nodes import node
from tests import imports


@node
@dataclass(frozen=True)
class One:
  a: Any
  roles: tuple[str, ...] = field(default=("in", "out"), metadata={"static": True})


@node
@dataclass(frozen=True)
class Other(One):
  pass


def test_classes_alike_have_unlike_structures():
  one, other = (jax.tree.structure(cls(1.0)) for cls in (One, Other))
  assert one != other
  with pytest.raises(ValueError, match="One"):
    jax.tree.map(lambda x, y: x, One(1.0), Other(2.0))


def test_a_node_is_as_a_dataclass_of_jax():
  tree = One({"x": 1.0}, ("out",))
  assert jax.tree.map(lambda x: x + 1, tree) == One({"x": 2.0}, ("out",))
  assert jax.tree.structure(tree) != jax.tree.structure(One({"x": 1.0}))
  [(path, leaf)] = jax.tree_util.tree_leaves_with_path(tree)
  assert (path[0], leaf) == (GetAttrKey("a"), 1.0)


KINDS = [*lx.METHODS.values(), *quant.FORMATS.values()]


def _structure(cls):
  """A node whose children and static fields are all numbers, where they can be."""
  made = object.__new__(cls)
  for i, each in enumerate(dataclasses.fields(cls)):
    object.__setattr__(made, each.name, 0 if each.metadata.get("static") else float(i))
  return jax.tree.structure(made)


def test_no_method_and_no_format_is_taken_for_another():
  for one, other in itertools.combinations(KINDS, 2):
    assert _structure(one) != _structure(other), (one, other)


def test_no_module_registers_a_dataclass_with_jax():
  for file in imports.files("lorax_flax"):
    assert "register_dataclass(" not in file.read_text(), file
    assert "@jax.tree_util.register_dataclass" not in file.read_text(), file

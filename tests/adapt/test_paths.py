"""Names of leaves: what Flax's boxes add is left out, and nothing else."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import pytest
from flax import nnx

import lorax_flax as lx
from lorax_flax.adapt.paths import flatten, map_with_path
from lorax_flax.nodes import node


@node
@dataclass
class Attention:
  query: Any
  value: Any


def test_the_value_of_flaxs_boxes_is_no_part_of_a_name():
  state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  assert list(flatten({"up": state})) == ["up/bias", "up/kernel"]
  assert list(flatten({"k": nn.Partitioned(jnp.ones(2), ("a",))})) == ["k"]


def test_a_module_called_value_keeps_its_name():
  weight = {"weight": jnp.ones((2, 2))}
  tree = {"attn": Attention(weight, weight)}
  assert list(flatten(tree)) == ["attn/query/weight", "attn/value/weight"]


def test_a_field_called_value_beside_others_keeps_its_name():
  tree = {"attn": Attention(jnp.ones((2, 2)), jnp.ones((2, 2))), "up": jnp.ones(2)}
  assert list(flatten(tree)) == ["attn/query", "attn/value", "up"]
  got = map_with_path(lambda path, x, y: (path, x is y), tree, tree)
  assert got["attn"].value == ("attn/value", True)


def test_a_pattern_targets_what_lies_in_a_field_called_value():
  params = {
    "attn": Attention({"weight": jnp.ones((6, 6))}, {"weight": jnp.ones((6, 6))})
  }

  def fn(p, x):
    return (x @ p["attn"].query["weight"]) @ p["attn"].value["weight"]

  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets=r".*(query|value)/weight"))
  found = [t.path for t in lora.plan(params, jnp.ones((3, 6))).targets]
  assert found == ["attn/query/weight", "attn/value/weight"]


def test_leaves_with_one_path_are_an_error_that_names_both():
  tree = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
  with pytest.raises(lx.LoraxError, match=r"path 'a/b': \['a'\]\['b'\] and \['a/b'\]"):
    flatten(tree)

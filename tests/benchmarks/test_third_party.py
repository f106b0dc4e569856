"""The table of third-party models, on rows that need no library beyond the tests'."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.third_party import __main__ as table
from benchmarks.third_party import check
from lorax_flax.adapt.interpret import product_rules


@pytest.fixture(autouse=True)
def standard_promotion():
  """optax, and other people's models, rely on it."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.mark.parametrize("name", ["linen/lstm", "equinox/attention", "haiku/attention"])
def test_an_adapter_equals_the_dense_sum_and_learns(name):
  row = check.check(table.models()[0][name]())
  assert max(row.no_op, row.merge) < 1e-6
  assert row.gradient < 5e-6
  assert row.losses[-1] < row.losses[0]


def test_a_wrong_product_shows(monkeypatch):
  right = product_rules.dot_general

  def wrong(*args):
    return 1.01 * right(*args)

  monkeypatch.setitem(product_rules.RULES, "dot_general", wrong)
  row = check.check(table.models()[0]["equinox/mlp"]())
  assert min(row.no_op, row.merge, row.gradient) > 1e-4


def test_a_refused_model_has_the_reason_in_its_row():
  def build():
    weights = {"w": jnp.ones((2, 3))}
    return check.Model(lambda p, x: jnp.tanh(x + p["w"]), weights, (jnp.ones((2, 3)),))

  targets, *_, note = check.cells(build)
  assert targets == "refused"
  assert "found no weight that a contraction consumes" in note


def test_the_table_lists_the_models_of_each_framework():
  found, _ = table.models()
  frameworks = {name.split("/")[0] for name in found}
  assert {"linen", "nnx", "equinox", "haiku", "others"} <= frameworks

"""Rows of a table trained in place, against the table with these rows written in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_flax as lx
from tests.adapt.checks import all_equations, check_equals_merged, perturbed

VOCAB, WIDTH, ROWS = 13, 5, (7, 0, 12)


def tied(params, ids):
  x = jnp.tanh(params["embed"]["embedding"][ids] @ params["up"]["kernel"])
  return x @ params["embed"]["embedding"].T


def untied(params, ids):
  x = jnp.tanh(params["embed"]["embedding"][ids] @ params["up"]["kernel"])
  return x @ params["head"]["kernel"]


@pytest.fixture
def params():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    "embed": {"embedding": draw(VOCAB, WIDTH)},
    "up": {"kernel": draw(WIDTH, WIDTH)},
    "head": {"kernel": draw(WIDTH, VOCAB)},
  }


IDS = jnp.array([[7, 1, 7, 3], [0, 12, 2, 7]])


@pytest.mark.parametrize(
  ("fn", "rows"),
  [
    (tied, {"embed": ROWS}),
    (untied, {"embed/embedding": ROWS}),
    (untied, {"head": ROWS, "embed": (4, 7)}),
  ],
)
def test_applied_equals_merged_and_back(params, fn, rows):
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets=["up"], rows=rows))
  adapter = lora.init(jax.random.key(0), params, IDS)
  np.testing.assert_allclose(lora.apply(params, adapter, IDS), fn(params, IDS))
  moved = perturbed(adapter)
  check_equals_merged(lora, fn, params, moved, IDS)
  merged = lx.merge(params, moved)
  assert (
    lx.merge(params, moved)["embed"]["embedding"][7] != params["embed"]["embedding"][7]
  ).all()
  back = lx.unmerge(merged, moved)
  for name in ("embed", "head"):
    jax.tree.map(np.testing.assert_array_equal, back[name], params[name])


def test_the_rows_are_written_in_and_no_others(params):
  lora = lx.adapt(untied, lx.LoraConfig(targets=(), rows={"embed": ROWS, "head": (2,)}))
  moved = perturbed(lora.init(jax.random.key(0), params, IDS))
  merged = lx.merge(params, moved)
  embed = np.array(params["embed"]["embedding"])
  embed[list(ROWS)] = moved["embed/embedding"].rows
  head = np.array(params["head"]["kernel"])
  head[:, 2] = moved["head/kernel"].rows[0]
  np.testing.assert_array_equal(merged["embed"]["embedding"], embed)
  np.testing.assert_array_equal(merged["head"]["kernel"], head)


def test_no_gradient_of_the_tables_size_is_formed(params):
  lora = lx.adapt(tied, lx.LoraConfig(targets=(), rows={"embed": ROWS}))
  adapter = lora.init(jax.random.key(0), params, IDS)
  trained, rest = lx.partition(adapter, lx.trainable_mask(adapter))
  loss = lambda t: jnp.sum(lora.apply(params, lx.combine(t, rest), IDS) ** 2)
  for eqn in all_equations(jax.make_jaxpr(jax.grad(loss))(trained)):
    if eqn.primitive.name.startswith(("dot", "scatter", "add")):
      assert all(sorted(v.aval.shape) != [WIDTH, VOCAB] for v in eqn.outvars), eqn


def test_all_linear_leaves_a_table_of_trained_rows_alone(params):
  config = lx.LoraConfig(targets="all-linear", rows={"head": (2,)})
  plan = lx.adapt(untied, config).plan(params, IDS)
  assert [t.path for t in plan.targets] == ["up/kernel"]
  assert "3 rows" not in str(plan)
  assert "1 rows" in str(plan)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"rows": {"embedd": (1,)}}, "rows: 'embedd' matches nothing. Nearest: embed"),
    ({"rows": {"embed": (13,)}}, "has 13 rows, and 13 is requested"),
    ({"rows": {"embed": (1,)}, "targets": ["embed"]}, "embed/embedding is among the"),
    ({"rows": {"embed": (1,)}, "tuned": ["embed"]}, "embed/embedding is among the"),
    ({"rows": {"embed": (1,), "embed/embedding": (2,)}}, "named twice"),
  ],
)
def test_rows_that_cannot_be_are_an_error(params, config, message):
  config = lx.LoraConfig(**{"targets": (), **config})
  with pytest.raises(lx.LoraxError, match=message):
    lx.adapt(untied, config).plan(params, IDS)


@pytest.mark.parametrize("numbers", [(), (1, 1), (-1,), (1.5,)])
def test_row_numbers_are_different_ints(numbers):
  with pytest.raises(lx.LoraxError, match="different ints"):
    lx.LoraConfig(rows={"embed": numbers})

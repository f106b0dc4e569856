"""Sums of adapters, against their definition (against PEFT: tests/experiments)."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import lorax_flax as lx
from lorax_flax.adapt.algebra import TYPES, as_lora, bernoulli, combine_adapters

OPTIONS = {"density": 0.5}
WEIGHTS = (0.7, -1.2)


def lora(seed, shape, rank=2, roles=("in", "out"), layers=None, scale=1.5):
  """A random LoRA of a kernel of this shape."""
  rng = np.random.default_rng(seed)
  stack, ins, outs = (
    [n for n, r in zip(shape, roles, strict=True) if r == role]
    for role in ("stack", "in", "out")
  )
  if layers is not None:
    stack[0] = len(layers)
  a, b = rng.normal(size=(*stack, *ins, rank)), rng.normal(size=(*stack, rank, *outs))
  a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
  return lx.LoRA(a, b, jnp.float32(scale), roles, layers=layers)


def options(combination):
  found = {} if combination in ("svd", "cat", "linear") else dict(OPTIONS)
  if combination.startswith("dare"):
    # By the layer and the adapter alone, so that paths make no difference.
    draw = bernoulli(0.5, 3)
    found["keep"] = lambda place, shape: draw(place._replace(path="", layer=()), shape)
  return found


def change(params, adapter):
  """What an adapter adds to the kernel, for a base of zeros."""
  return np.asarray(lx.merge(params, adapter)["kernel"])


@pytest.mark.parametrize("combination", TYPES)
def test_stacked_layers_are_summed_one_by_one(combination):
  shape, roles = (3, 6, 4), ("stack", "in", "out")
  params = {"kernel": jnp.zeros(shape)}
  deltas = [lora(1, shape, roles=roles), lora(2, shape, roles=roles, layers=(0, 2))]
  adapters = [{"kernel": delta} for delta in deltas]
  together, errors = combine_adapters(
    params, adapters, WEIGHTS, combination, **options(combination)
  )
  assert together["kernel"].roles == roles
  summed = change(params, together)
  for layer, places in {0: (0, 0), 1: (1, None), 2: (2, 1)}.items():
    chosen = [
      (replace(d, a=d.a[i], b=d.b[i], roles=("in", "out"), layers=None), w)
      for d, i, w in zip(deltas, places, WEIGHTS, strict=True)
      if i is not None
    ]
    alone, _ = combine_adapters(
      one := {"kernel": params["kernel"][layer]},
      [{"kernel": delta} for delta, _ in chosen],
      [w for _, w in chosen],
      combination,
      **options(combination),
    )
    np.testing.assert_allclose(summed[layer], change(one, alone), rtol=1e-4, atol=1e-5)
  assert errors.keys() == ({"kernel"} if combination.endswith("svd") else set())


@pytest.mark.parametrize(
  ("shape", "roles"),
  [((6, 3, 4), ("in", "stack", "out")), ((3, 2, 5, 4), ("in", "in", "in", "out"))],
  ids=["stack within", "convolution"],
)
@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_the_exact_types_are_the_sum_of_the_changes(combination, shape, roles):
  params = {"kernel": jnp.zeros(shape)}
  one, other = (lora(i, shape, i + 1, roles) for i in (1, 2))
  fields = {"rank": 5} if combination == "svd" else {}
  summed, errors = combine_adapters(
    params, [{"kernel": one}, {"kernel": other}], WEIGHTS, combination, **fields
  )
  first, second = (change(params, {"kernel": x}) for x in (one, other))
  wanted = WEIGHTS[0] * first + WEIGHTS[1] * second
  np.testing.assert_allclose(change(params, summed), wanted, rtol=1e-4, atol=1e-5)
  assert max(errors.values(), default=0.0) < 1e-5


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_a_cut_loses_is_what_it_says(method):
  shape = (6, 4)
  params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=shape), "f4")}
  delta = lora(1, shape, 3)
  if method == "dora":
    delta = lx.DoRA(**vars(delta), magnitude=jnp.arange(1.0, 5.0))
  cut, errors = as_lora(params, {"kernel": delta}, 1)
  whole, kept = (change(params, x) - params["kernel"] for x in ({"kernel": delta}, cut))
  lost = np.linalg.norm(whole - kept) / np.linalg.norm(whole)
  assert cut["kernel"].rank == 1
  assert 0.1 < lost < 0.9
  np.testing.assert_allclose(errors["kernel"], lost, rtol=1e-4)


def test_random_entries_are_a_function_of_the_seed_and_the_place():
  shape = (6, 4)
  params = {name: jnp.zeros(shape) for name in ("kernel", "other")}
  adapter = {"kernel": lora(1, shape), "other": lora(1, shape)}
  draw = lambda chosen, seed: (
    combine_adapters(
      params, [chosen], [1.0], "dare_linear", density=0.5, keep=bernoulli(0.5, seed)
    )
    .adapter["kernel"]
    .a
  )
  alone = {"kernel": adapter["kernel"]}
  np.testing.assert_array_equal(draw(adapter, 0), draw(alone, 0))
  assert (draw(adapter, 0) != draw(adapter, 1)).any()


TUNED = lx.Tuned(jnp.ones(3), jnp.zeros(3))


@pytest.mark.parametrize(
  ("other", "fields", "message"),
  [
    ({}, {"combination": "tise"}, "unknown type of combination 'tise'.*'ties'"),
    ({}, {"combination": "cat", "rank": 2}, "rank does nothing in cat"),
    ({}, {"combination": "svd", "rank": 0}, "rank must be at least 1, not 0"),
    ({}, {"combination": "linear", "density": 0.5}, "density does nothing in linear"),
    ({}, {"combination": "ties"}, "ties needs density"),
    ({}, {"combination": "ties", "density": 0.0}, "density must be above 0"),
    ({}, {"combination": "dare_ties", "density": 0.5}, "dare_ties needs keep"),
    ({}, {"combination": "cat", "majority": "total"}, "majority does nothing in cat"),
    (
      {},
      {"combination": "ties", "density": 0.5, "majority": "totl"},
      "unknown majority 'totl'",
    ),
    ({}, {"weights": [1.0]}, "2 adapters need as many finite weights"),
    ({}, {"weights": [1.0, np.nan]}, "2 adapters need as many finite weights"),
    (
      {"kernel": lora(1, (6, 4), 3)},
      {"combination": "linear"},
      r"ranks \[2, 3\] at kernel cannot be summed: cat",
    ),
    ({"kernal": lora(1, (6, 4))}, {}, "adapter path 'kernal'; did you mean 'kernel'"),
    (
      {"kernel": lora(1, (6, 4), roles=("out", "in"))},
      {},
      "kernel: the adapters take its axes for",
    ),
    ({"bias": TUNED}, {}, "bias is trained in full or by rows, and differs"),
    (
      {"kernel": lx.DoRA(**vars(lora(1, (6, 4))), magnitude=jnp.ones(4))},
      {"combination": "cat"},
      "kernel: DoRA has no factors to sum: choose a type that ends in svd",
    ),
    (
      {"kernel": lx.BiasLoRA(**vars(lora(1, (6, 4))), bias=jnp.ones(4))},
      {},
      "kernel: BiasLoRA adds a bias, which a LoRA has no place for",
    ),
  ],
)
def test_what_has_no_sum_is_refused_by_name(other, fields, message):
  params = {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(3)}
  adapters = [{"kernel": lora(1, (6, 4))}, other]
  with pytest.raises(lx.LoraxError, match=message):
    combine_adapters(params, adapters, **{"weights": [1.0, 1.0], **fields})


def test_what_is_trained_in_full_stays_where_it_is_the_same():
  params = {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(3)}
  adapter = {"kernel": lora(1, (6, 4)), "bias": TUNED}
  again = {**adapter, "bias": replace(TUNED, value=jnp.ones(3))}
  summed, _ = combine_adapters(params, [adapter, again], WEIGHTS, "cat")
  assert summed["bias"] is TUNED or np.array_equal(summed["bias"].value, TUNED.value)
  again["bias"] = replace(TUNED, value=jnp.zeros(3))
  with pytest.raises(lx.LoraxError, match="bias is trained in full"):
    combine_adapters(params, [adapter, again], WEIGHTS, "cat")

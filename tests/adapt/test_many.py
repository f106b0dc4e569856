"""Each example of a batch with an adapter of its own, against each alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_flax as lx
from lorax_flax.adapt.interpret import evaluations
from lorax_flax.methods.slots import Choice
from lorax_flax.quant import quantize
from tests import compiles
from tests.adapt import checks

RANK = 6
METHODS = {
  "lora": (2, ["emb", "layers/k", "head"]),
  "dora": (3, ["layers/k"]),
  "lora_bias": (RANK, ["head"]),
  "pissa": (3, ["layers/k", "head"]),
  "olora": (2, ["head"]),
  "fused_lora": (1, ["head"]),
  "loha": (2, ["head"]),  # a product of two factors of rank 4
}


def looped(params, x_BxT):
  h = params["emb"][x_BxT]
  for k in params["layers"]["k"]:
    h = h + jnp.tanh(h @ k)
  return h @ params["head"]


def scanned(params, x_BxT):
  def layer(h, k):
    return h + jnp.tanh(h @ k), None

  h, _ = jax.lax.scan(layer, params["emb"][x_BxT], params["layers"]["k"])
  return h @ params["head"]


@pytest.fixture
def params():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)
  return {"emb": draw(11, 8), "layers": {"k": draw(3, 8, 8)}, "head": draw(8, 6)}


@pytest.fixture(params=["gathered", "side by side", "sorted"])
def evaluation(request, monkeypatch):
  speed = 1e-9 if request.param == "gathered" else 1e9
  monkeypatch.setitem(evaluations.SPEED, "cpu", speed)
  sorting = -1e9 if request.param == "sorted" else 1e9
  monkeypatch.setitem(evaluations.SORTING, "cpu", sorting)
  return request.param


X = jnp.asarray(np.random.default_rng(1).integers(0, 11, (5, 7)))


def adapter_of(params, method, rank, targets, seed=0, **config):
  if method == "fused_lora":
    config["options"] = {"enable_lora": (True, False, True)}
  config = {"rank": rank, "alpha": 3, "method": method, "targets": targets, **config}
  lora = lx.adapt(scanned, lx.LoraConfig(**config))
  return checks.perturbed(lora.init(jax.random.key(seed), params, X), seed)


def of_all_methods(params):
  return [
    adapter_of(params, method, *rest, seed)
    for seed, (method, rest) in enumerate(METHODS.items())
  ]


def filled(many, params, adapters, **options):
  slots = many.empty(params, *adapters, **options)
  for i, adapter in enumerate(adapters):
    slots = many.put(params, slots, i, adapter)
  return slots


def base_lora(fn):
  return lx.adapt(fn, lx.LoraConfig())


@pytest.mark.parametrize("fn", [looped, scanned])
def test_each_example_equals_its_adapter_alone(params, fn, evaluation):
  adapters, lora = of_all_methods(params), base_lora(fn)
  many = lx.many(lora, capacity=len(adapters), max_rank=RANK)
  slots, apply = filled(many, params, adapters), jax.jit(many.apply)
  alone_of = jax.jit(lora.apply)
  for ids in ([0, 1, 2, 3, 4], [5, -1, 6, 1, 0]):
    got = apply(params, slots, np.array(ids), X)
    for row, i in enumerate(ids):
      adapter = adapters[i] if i >= 0 else {}
      alone = alone_of(params, adapter, X[row : row + 1])[0]
      np.testing.assert_allclose(got[row], alone, atol=1e-5)
      if i >= 0:
        assert np.abs(alone - fn(params, X)[row]).max() > 0.01
      else:
        np.testing.assert_allclose(got[row], fn(params, X)[row], atol=1e-6)


@pytest.mark.parametrize("fn", [looped, scanned])
def test_each_token_equals_its_adapter_alone(params, fn, evaluation):
  adapters, lora = of_all_methods(params), base_lora(fn)
  many = lx.many(lora, capacity=len(adapters), max_rank=RANK)
  slots, apply = filled(many, params, adapters), jax.jit(many.apply)
  ids = np.random.default_rng(2).integers(-1, len(adapters), X.shape)
  ids[0] = -1
  got = apply(params, slots, ids, X)
  text = str(jax.make_jaxpr(many.apply)(params, slots, ids, X))
  assert ("ragged_product" in text) == (evaluation == "sorted")
  alone_of = jax.jit(lora.apply)
  for i, adapter in [*enumerate(adapters), (-1, {})]:
    alone = alone_of(params, adapter, X)
    np.testing.assert_allclose(got[ids == i], alone[ids == i], atol=1e-5)
  # One token an example is one index an example.
  one = apply(params, slots, ids[:, :1], X[:, :1])
  np.testing.assert_allclose(one, got[:, :1], atol=1e-5)
  # Slots with an axis of trials: each as alone.
  trials = jax.tree.map(lambda t: jnp.stack([t, 0 * t]), slots)
  both = jax.jit(jax.vmap(lambda slots: many.apply(params, slots, ids, X)))(trials)
  np.testing.assert_allclose(both[0], got, atol=1e-5)
  ids[1, 2] = len(adapters)
  unknown = np.isnan(apply(params, slots, ids, X)).all(-1)
  np.testing.assert_array_equal(unknown, ids == len(adapters))


def test_an_index_for_each_token_needs_tokens(params):
  adapter = adapter_of(params, "lora", 2, ["head"])
  pooled = base_lora(lambda p, x: p["emb"][x].mean(1) @ p["head"])
  many = lx.many(pooled, capacity=1, max_rank=2)
  slots, ids = filled(many, params, [adapter]), np.zeros(X.shape, np.int32)
  with pytest.raises(lx.LoraxError, match=r"'head' meets .* of the 7 tokens"):
    many.apply(params, slots, ids, X)
  config = lx.LoraConfig(rank=2, targets=["k"], tuned=["head"])
  tuned = lx.adapt(scanned, config).init(jax.random.key(0), params, X)
  many = lx.many(base_lora(scanned), capacity=1, max_rank=2)
  with pytest.raises(lx.LoraxError, match="train head in full"):
    many.apply(params, filled(many, params, [tuned]), ids, X)


def test_a_program_takes_the_evaluation_of_the_least_time(monkeypatch):
  def of(slots, examples, places, tokens=(), sortable=True):
    choice = Choice(jnp.zeros(tokens, jnp.int32), slots, examples)
    return evaluations.form_of(choice, places, 16, sortable)

  # A step of decoding reads an adapter once for each row; of a prompt, that is little.
  assert of(64, 64, 1) == of(8, 64, 1) == "sorted"
  assert of(64, 64, 1, sortable=False) == "gathered"
  assert of(8, 8, 512) == of(2048, 8, 512) == "gathered"
  assert of(64, 8, 512, (512,)) == "sorted"
  platform = lambda name: monkeypatch.setattr(
    evaluations.devices, "platform", lambda: name
  )
  platform("tpu")
  by_token = [of(slots, 8, 512, (512,)) for slots in (8, 64, 512)]
  assert by_token == ["side by side", "side by side", "sorted"]
  assert of(512, 8, 512, (512,), sortable=False) == "side by side"
  platform("gpu")
  assert of(512, 8, 512, (512,)) == "side by side"


def test_a_function_may_take_gradients_of_each_example(params, evaluation):
  adapters = [adapter_of(params, "lora", 2, ["layers/k"], seed) for seed in (1, 2)]

  def slope(params, h_BxD):
    def total(h_BxD):
      return jnp.sum(jnp.sin(h_BxD @ params["layers"]["k"][0]))

    return jax.grad(total)(h_BxD)

  lora = lx.adapt(slope, lx.LoraConfig())
  many = lx.many(lora, capacity=2, max_rank=2)
  ids, h_BxD = np.array([1, -1, 0]), params["emb"][:3]
  got = jax.jit(many.apply)(params, filled(many, params, adapters), ids, h_BxD)
  for row, i in enumerate(ids):
    alone = lora.apply(params, adapters[i] if i >= 0 else {}, h_BxD[row : row + 1])[0]
    np.testing.assert_allclose(got[row], alone, atol=1e-5)


def test_gradients_of_the_slots_are_those_of_each_alone(params, evaluation):
  method = ["lora", "dora"]
  adapters = [adapter_of(params, m, *METHODS[m], i) for i, m in enumerate(method)]
  lora = base_lora(scanned)
  many = lx.many(lora, capacity=3, max_rank=RANK)
  ids = np.array([1, 0, -1, 1, 0])

  def loss(adapters):
    slots = many.filled(params, adapters)
    return jnp.sum(jnp.sin(many.apply(params, slots, ids, X)))

  def alone(adapters):
    total = 0.0
    for i, adapter in enumerate(adapters):
      total += jnp.sum(jnp.sin(lora.apply(params, adapter, X[ids == i])))
    return total

  got, expected = jax.jit(jax.grad(loss))(adapters), jax.jit(jax.grad(alone))(adapters)
  for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(g, e, atol=1e-5, rtol=1e-4)


@jax.numpy_dtype_promotion("standard")  # for Adam's count of steps
def test_tenants_that_train_in_one_batch_train_as_each_alone(params):
  lora, optimizer = base_lora(scanned), optax.adam(0.01)
  adapters = [adapter_of(params, "lora", r, METHODS["lora"][1], r) for r in (2, 4)]
  many = lx.many(lora, capacity=2, max_rank=RANK)
  ids, labels = np.array([1, 0, 1, 1, 0]), jnp.asarray(X % 6)

  def loss_of(logits_BxTxC, labels_BxT):
    each = optax.softmax_cross_entropy_with_integer_labels(logits_BxTxC, labels_BxT)
    return each.mean(axis=1)

  trained = [lx.partition(a, lx.trainable_mask(a)) for a in adapters]
  states = [optimizer.init(t) for t, _ in trained]

  @jax.jit
  def together(trained, states):
    def loss(trained):
      full = [lx.combine(t, r) for t, (_, r) in zip(trained, rests, strict=True)]
      losses_B = loss_of(many.apply(params, many.filled(params, full), ids, X), labels)
      # The mean over each tenant's own rows.
      return sum(losses_B[ids == i].mean() for i in range(2))

    grads, new = jax.grad(loss)(trained), []
    for g, s, t in zip(grads, states, trained, strict=True):
      updates, s = optimizer.update(g, s)
      new.append((optax.apply_updates(t, updates), s))
    return [t for t, _ in new], [s for _, s in new]

  @jax.jit
  def alone(trained, rest, state, x, labels):
    def loss(trained):
      full = lx.combine(trained, rest)
      return loss_of(lora.apply(params, full, x), labels).mean()

    updates, state = optimizer.update(jax.grad(loss)(trained), state)
    return optax.apply_updates(trained, updates), state

  rests = trained
  got = [t for t, _ in trained]
  expected = [(t, s) for (t, _), s in zip(trained, states, strict=True)]
  for _ in range(4):
    got, states = together(got, states)
    expected = [
      alone(t, rests[i][1], s, X[ids == i], labels[ids == i])
      for i, (t, s) in enumerate(expected)
    ]
  for i, (t, _) in enumerate(expected):
    for g, e in zip(jax.tree.leaves(got[i]), jax.tree.leaves(t), strict=True):
      np.testing.assert_allclose(g, e, atol=1e-5)


def test_sixty_four_adapters_in_one_batch(params, evaluation):
  rng = np.random.default_rng(3)
  targets = [METHODS["lora"][1], ["head"], ["layers/k"]]
  adapters = [
    adapter_of(params, "lora", int(rng.integers(1, 5)), targets[i % 3], i)
    for i in range(64)
  ]
  lora = base_lora(scanned)
  many = lx.many(lora, capacity=64, max_rank=RANK)
  slots = filled(many, params, adapters)
  ids, x = rng.permutation(64), jnp.asarray(rng.integers(0, 11, (64, 3)))
  got, alone = jax.jit(many.apply)(params, slots, ids, x), jax.jit(lora.apply)
  for row, i in enumerate(ids):
    expected = alone(params, adapters[i], x[row : row + 1])[0]
    np.testing.assert_allclose(got[row], expected, atol=1e-5)


def test_the_bases_product_is_one(params, evaluation):
  many = lx.many(base_lora(looped), capacity=3, max_rank=RANK)
  slots = many.empty(params, adapter_of(params, "lora", 2, ["layers/k"]))
  args = params, slots, np.zeros(5, np.int32), X
  jaxpr = jax.make_jaxpr(many.apply)(*args)
  shapes = [
    sorted(v.aval.shape for v in eqn.invars)
    for eqn in checks.all_equations(jaxpr)
    if eqn.primitive.name == "dot_general"
  ]
  assert shapes.count([(5, 1, 7, 8), (8, 8)]) == 3  # one for each layer
  text = jax.jit(many.apply).lower(*args).compile().as_text()
  # And no kernel is repeated for the examples.
  assert not re.findall(r"f32\[5,(?:1,)?8,8\]", text)


def test_a_put_compiles_nothing_whatever_ranks_and_targets(params):
  adapters = of_all_methods(params)
  many = lx.many(base_lora(scanned), capacity=4, max_rank=RANK)
  slots, apply = many.empty(params, *adapters), jax.jit(many.apply)
  for i, adapter in enumerate([adapters[0], adapters[1], None]):
    slots = many.put(params, slots, i, adapter)
  ids = np.array([0, 1, 2, 3, 3])
  apply(params, slots, ids, X)
  others = [
    adapter_of(params, "lora", 5, ["head"], 7),
    adapter_of(params, "lora", 1, ["layers/k", "emb"], 8),
    adapter_of(params, "dora", 4, ["layers/k"], 9),
  ]
  with compiles.counted() as found:
    for i, adapter in enumerate([*others, None]):
      slots = many.put(params, slots, (i + 1) % 4, adapter)
    got = apply(params, slots, ids, X)
  assert not found
  expected = base_lora(scanned).apply(params, others[0], X)
  np.testing.assert_allclose(got[1], expected[1], atol=1e-5)
  np.testing.assert_allclose(got[0], scanned(params, X)[0], atol=1e-5)  # cleared


def test_leaves_trained_in_full_are_chosen_too():
  params = {
    "k": jnp.ones((4, 3)) * 0.3,
    "bias": jnp.zeros(3),
    "norm": jnp.ones(4),
  }
  fn = lambda p, x: (x * p["norm"][None]) @ p["k"] + p["bias"][None]
  x = jnp.arange(12.0).reshape(3, 4)
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets=["k"], tuned=["bias", "norm"]))
  plain = lx.adapt(fn, lx.LoraConfig(rank=1, targets=["k"]))
  adapters = [
    checks.perturbed(each.init(jax.random.key(i), params, x), i)
    for i, each in enumerate((lora, plain))
  ]
  many = lx.many(lora, capacity=2, max_rank=2)
  slots = filled(many, params, adapters)
  apply = jax.jit(many.apply)
  got = apply(params, slots, np.array([0, 1, -1]), x)
  for row, adapter in enumerate((*adapters, {})):
    expected = lora.apply(params, adapter, x)[row]
    np.testing.assert_allclose(got[row], expected, atol=1e-5)
  slots = many.put(params, slots, 0, None)
  got = apply(params, slots, np.array([0, 1, -1]), x)
  np.testing.assert_allclose(got[0], fn(params, x)[0], atol=1e-6)


def test_the_base_may_be_quantised_and_activations_bfloat16(params, evaluation):
  adapter = adapter_of(params, "lora", 2, ["layers/k"])
  lora = lx.adapt(
    lambda p, x: scanned(jax.tree.map(lambda w: w.astype(jnp.bfloat16), p), x),
    lx.LoraConfig(),
  )
  many = lx.many(lora, capacity=2, max_rank=RANK)
  slots = filled(many, params, [adapter], dtype=jnp.bfloat16)
  got = many.apply(params, slots, np.array([0, -1, 0, 0, -1]), X)
  assert got.dtype == jnp.bfloat16
  rounded = jax.tree.map(lambda t: t.astype(jnp.bfloat16).astype(jnp.float32), adapter)
  for row, own in enumerate((rounded, {}, rounded, rounded, {})):
    expected = lora.apply(params, own, X)[row].astype(jnp.float32)
    np.testing.assert_allclose(got[row].astype(jnp.float32), expected, atol=0.2)
  stored = {**params, "layers": {"k": quantize(params["layers"]["k"], "int8")}}
  got = jax.jit(many.apply)(stored, slots, np.array([0, -1, 0, 0, -1]), X)
  expected = lora.apply(stored, rounded, X)[0].astype(jnp.float32)
  np.testing.assert_allclose(got[0].astype(jnp.float32), expected, atol=0.2)
  ids = np.full(X.shape, -1)
  ids[:, 2:] = 0
  got = jax.jit(many.apply)(stored, slots, ids, X)[0].astype(jnp.float32)
  base = lora.apply(stored, {}, X)[0].astype(jnp.float32)
  np.testing.assert_allclose(got[2:], expected[2:], atol=0.2)
  np.testing.assert_allclose(got[:2], base[:2], atol=0.2)


def test_axes_of_examples_and_what_they_share(params):
  def fn(params, x_TxB, *, scale, by, deterministic):
    assert deterministic is True
    y = jnp.tanh(x_TxB[..., None] * params["w"][None]) @ params["head"]
    return y * scale * by[None, :, None], jnp.sum(y)

  params = {"w": jnp.ones((1, 4)), "head": jnp.ones((4, 3))}
  x_TxB = jnp.arange(10.0).reshape(5, 2)
  by = jnp.array([1.0, 2.0])
  given = {"scale": jnp.float32(2), "by": by, "deterministic": True}
  lora = lx.adapt(fn, lx.LoraConfig(rank=1, targets=["head"]))
  adapter = checks.perturbed(lora.init(jax.random.key(0), params, x_TxB, **given))
  axes = ((1,), {"scale": None, "by": 0, "deterministic": None})
  many = lx.many(lora, capacity=1, max_rank=1, in_axes=axes, out_axes=(1, 0))
  slots = filled(many, params, [adapter])
  y, total = many.apply(params, slots, np.array([0, -1]), x_TxB, **given)
  assert y.shape == (5, 2, 3)
  assert total.shape == (2,)
  for row, own in enumerate((adapter, {})):
    one = {**given, "by": by[row : row + 1]}
    expected, loss = lora.apply(params, own, x_TxB[:, row : row + 1], **one)
    np.testing.assert_allclose(y[:, row], expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(total[row], loss, rtol=1e-5)


def test_dropout_differs_from_example_to_example(params):
  adapter = adapter_of(params, "lora", 2, ["head"], dropout=0.5)
  many = lx.many(base_lora(scanned), capacity=1, max_rank=2)
  slots, same = filled(many, params, [adapter]), jnp.tile(X[:1], (5, 1))
  ids, key = np.zeros(5, np.int32), jax.random.key(3)
  apply = jax.jit(many.apply)
  run = lambda **key: apply(params, slots, ids, same, **key)
  assert (run() == run()[:1]).all()
  got = run(lora_dropout_key=key)
  assert (got == run(lora_dropout_key=key)).all()
  assert all((got[i] != got[j]).any() for i in range(5) for j in range(i))


def test_what_does_not_fit_is_an_error_by_name(params):
  small = adapter_of(params, "lora", 2, ["head"])
  many = lx.many(base_lora(scanned), capacity=2, max_rank=4)
  slots = many.empty(params, small)
  put = lambda index, adapter: many.put(params, slots, index, adapter)
  with pytest.raises(lx.LoraxError, match=r"slot 2 of 2 .capacity"):
    put(2, small)
  with pytest.raises(lx.LoraxError, match=r"head' has factors of rank 5, .*rank is 4"):
    put(0, adapter_of(params, "lora", 5, ["head"]))
  with pytest.raises(lx.LoraxError, match="unknown path of the slots 'layers/k'"):
    put(0, adapter_of(params, "lora", 2, ["head", "layers/k"]))
  with pytest.raises(lx.LoraxError, match="DoRA of 'head' has the part 'out_scale'"):
    put(0, adapter_of(params, "dora", 2, ["head"]))
  for method, options in (
    ("c3a", {"block_size": 2}),
    ("fourierft", {"n_frequency": 9}),
  ):
    config = lx.LoraConfig(method=method, targets=["head"], options=options)
    lora = lx.adapt(scanned, config)
    other = checks.perturbed(lora.init(jax.random.key(0), params, X))
    with pytest.raises(lx.LoraxError, match=r"head' is not a product.*as_lora"):
      put(0, other)
    many.fitted(params, slots, lx.as_lora(params, other, rank=4).adapter)
  with pytest.raises(lx.LoraxError, match="unknown adapter path 'tail'"):
    many.empty(params, {"tail": small["head"]})
  with pytest.raises(lx.LoraxError, match="slots for no leaf"):
    many.empty(params)
  ids = lambda *ids: many.apply(params, slots, np.array(ids), X)
  with pytest.raises(lx.LoraxError, match="the slots are 0 to 1"):
    ids(0, 1, 2, 0, 0)
  with pytest.raises(lx.LoraxError, match="has not the 4 examples"):
    ids(0, 1, 0, 1)
  # Nothing of all this was given away.
  assert ids(0, 1, 0, 1, -1).shape == (5, 7, 6)
  # Under jit an id is data: what no slot answers to is not taken for the base.
  assert np.isnan(
    jax.jit(many.apply)(params, slots, np.array([0, 2, 0, 0, 0]), X)[1]
  ).all()


_ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np
import lorax_flax as lx
from lorax_flax.sharding import mesh as meshes
from tests.adapt import test_many as tests

config = meshes.MeshConfig(data=2, fsdp=2, tensor=2)
mesh, rng = meshes.make(config), np.random.default_rng(0)
draw = lambda *shape: rng.normal(size=shape).astype("f4")
params = {"emb": draw(11, 8), "layers": {"k": draw(3, 8, 8)}, "head": draw(8, 6)}
axes = {
  "emb": ("replicated", "embed"), "layers/k": ("layers", "embed", "mlp"),
  "head": ("embed", "vocab"),
}
adapters = [
  tests.adapter_of(params, "lora", 2, ["layers/k", "head"]),
  tests.adapter_of(params, "dora", 3, ["layers/k"], 1),
]
many = lx.many(tests.base_lora(tests.scanned), capacity=2, max_rank=4)
slots, ids = tests.filled(many, params, adapters), np.array([0, 1, -1, 1])
x = rng.integers(0, 11, (4, 7))
expected = jax.jit(many.apply)(params, slots, ids, x)
placed = meshes.of_adapter(mesh, axes, slots)
assert tuple(placed["layers/k"].a.spec) == (None, None, None, "fsdp")
assert tuple(placed["layers/k"].b.spec) == (None, None, None, "tensor")
with jax.set_mesh(mesh):
  sharded = meshes.place(params, meshes.of_params(mesh, axes, params))
  slots = meshes.place(slots, placed)
  batch = meshes.batch(mesh)
  ids, x = jax.device_put(ids, batch), jax.device_put(x, batch)
  got = jax.jit(many.apply)(sharded, slots, ids, x)
  np.testing.assert_allclose(got, expected, atol=1e-5)
  slots = many.put(sharded, slots, 0, adapters[1])
  assert tuple(slots["layers/k"].a.sharding.spec) == (None, None, None, "fsdp")
  got = jax.jit(many.apply)(sharded, slots, ids, x)
  np.testing.assert_allclose(got[1], expected[1], atol=1e-5)
  assert np.abs(got[0] - expected[0]).max() > 1e-3
"""


def test_a_mesh_of_eight_devices_makes_no_difference():
  root = Path(__file__).parents[2]
  environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
  done = subprocess.run(
    [sys.executable, "-c", _ON_A_MESH], cwd=root, env=environment, check=False
  )
  assert done.returncode == 0

"""What must hold of every method of targets, however its kernel is used."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_flax as lx
from lorax_flax.adapt.algebra import as_lora
from lorax_flax.hub.adapters import native
from tests.adapt.checks import check_equals_merged, check_no_dense_gradient, perturbed
from tests.methods import peft_methods as peers

LAYERS, WIDTH = 3, 12
LORAS = ("lora", "dora", "fused_lora", "pissa", "olora", "lora_ga", "corda")
OLD = {name: {"rank": 2, "alpha": 3.0} for name in LORAS}
NAMES = [*OLD, *peers.PEERS]
# The gradient of a rotation, or of a factor of full rank, has the inputs' size twice,
# which a square kernel has as well.
FORMED = {n for n, peer in peers.PEERS.items() if peer.formed} | {
  "oft",
  "boft",
  "randlora",
}
X = jax.random.normal(jax.random.key(1), (5, WIDTH))
KERNELS = jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH)) / 3


def single(params, x):
  return x @ params["kernel"]


def looped(params, x):
  for i in range(LAYERS):
    x = jnp.tanh(x @ params["kernel"][i])
  return x


def scanned(params, x):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["kernel"])[0]


def remat(params, x):
  body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
  return jax.lax.scan(body, x, params["kernel"])[0]


def joined(params, x):
  """A fused projection: the kernels of two, side by side."""
  return x @ jnp.concatenate([params["kernel"], params["other"]], axis=1)


def tied(params, x):
  return x @ params["kernel"] @ params["kernel"].T


CASES = {
  "single": (single, {"kernel": KERNELS[0]}, {}),
  "looped": (looped, {"kernel": KERNELS}, {"stack_axes": {"kernel": (0,)}}),
  "scanned": (scanned, {"kernel": KERNELS}, {}),
  "remat": (remat, {"kernel": KERNELS}, {}),
  "some layers": (remat, {"kernel": KERNELS}, {"layers": (0, 2)}),
  "joined": (joined, {"kernel": KERNELS[0], "other": KERNELS[1]}, {}),
}


def method(name):
  return name if name in OLD else peers.method(name)


@cache
def start(name, case):
  """Each adapter is made once, by one program."""
  fn, params, fields = CASES[case]
  own = OLD[name] if name in OLD else peers.PEERS[name].ours
  config = lx.LoraConfig(targets="kernel", method=method(name), **own, **fields)
  lora = lx.adapt(fn, config)
  key = jax.random.key(2)
  starts_from = lx.METHODS[method(name)].starts_from
  if starts_from == "inputs":
    return lora, fn, params, lx.init_from_activations(lora, key, params, [(X,)])
  if starts_from == "gradient":
    loss = lambda params, x: jnp.sin(fn(params, x)).sum()
    return lora, fn, params, lx.init_from_gradients(lora, key, params, loss, [X], X)
  adapter = jax.jit(lambda key, params: lora.init(key, params, X))
  return lora, fn, params, adapter(key, params)


# Some layers of a scan under remat for all, which asks the most of a method; one kernel
# where no comparison with PEFT has it; what else the following of factors has, for one
# of each shape: factors, one that all layers share, and a dense delta.
RUNS = [(name, "some layers") for name in NAMES]
RUNS += [(name, "single") for name in OLD] + [("ia3", "joined")]
RUNS += [
  (n, c) for n in ("loha", "vera", "hira") for c in ("remat", "looped", "joined")
]


@pytest.mark.parametrize(("name", "case"), RUNS)
def test_applied_is_merged_and_nothing_at_the_start(name, case):
  lora, fn, params, adapter = start(name, case)
  moved = perturbed(adapter)

  @jax.jit
  def results(adapter, moved, params):
    merged = lx.merge(params, moved)
    reversible = not lx.METHODS[method(name)].irreversible
    back = lx.unmerge(merged, moved) if reversible else params
    return lora.apply(params, adapter, X), fn(params, X), merged, back

  at_start, base, merged, back = results(adapter, moved, params)
  if name in OLD or peers.PEERS[name].starts_at_base:
    np.testing.assert_allclose(at_start, base, atol=2e-6)
  trained, _ = lx.partition(adapter, lx.trainable_mask(adapter))
  sizes = sum(x.size for x in jax.tree.leaves(trained))
  assert lora.plan(params, X).targets[0].size == sizes
  check_equals_merged(lora, fn, params, moved, X)
  if name not in FORMED:
    check_no_dense_gradient(lora, params, moved, X)
  assert np.abs(merged["kernel"] - params["kernel"]).max() > 1e-3
  if "layers" in CASES[case][2]:
    np.testing.assert_allclose(merged["kernel"][1], params["kernel"][1], rtol=1e-6)
  np.testing.assert_allclose(back["kernel"], params["kernel"], atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_many_adapters_and_half_precision(name, tmp_path):
  lora, fn, params, adapter = start(name, "scanned")
  several = [perturbed(adapter, seed) for seed in range(2)]
  stacked = jax.tree.map(lambda *xs: np.stack(xs), *several)
  got = jax.jit(jax.vmap(lambda a: lora.apply(params, a, X)))(stacked)
  merged = jax.jit(lambda adapter: fn(lx.merge(params, adapter), X))
  for one, each in zip(got, several, strict=True):
    np.testing.assert_allclose(one, merged(each), rtol=1e-5, atol=2e-5)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  low = jax.jit(lora.apply)(half, several[0], X.astype(jnp.bfloat16))
  assert low.dtype == jnp.bfloat16
  assert np.abs(low.astype(jnp.float32) - got[0]).max() < 0.1
  native.write_adapter(tmp_path / "ours", native.Saved(several[0], lora.config))
  found = native.read_adapter(tmp_path / "ours", params)
  assert found.config == lora.config
  jax.tree.map(np.testing.assert_array_equal, found.adapter, several[0])


@pytest.mark.parametrize("name", NAMES)
def test_any_method_is_a_lora_of_full_rank(name):
  lora, _, params, adapter = start(name, "some layers")
  moved = perturbed(adapter)
  found, errors = as_lora(params, moved, WIDTH)
  assert errors["kernel"] < 1e-5
  assert isinstance(found["kernel"], lx.LoRA)
  applied = jax.jit(lambda adapter: lora.apply(params, adapter, X))
  got, want = applied(found), applied(moved)
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["hira", "ia3", "ia3 of inputs"])
def test_a_tied_weight_is_used_both_ways(name):
  config = peers.config(name)
  params = {"kernel": KERNELS[0]}
  lora = lx.adapt(tied, config)
  moved = perturbed(lora.init(jax.random.key(2), params, X))
  check_equals_merged(lora, tied, params, moved, X)


def test_scales_of_inputs_that_two_kernels_share_are_refused():
  _, params, _ = CASES["joined"]
  lora = lx.adapt(joined, peers.config("ia3 of inputs"))
  with pytest.raises(lx.LoraxError, match="on an axis that the product does not have"):
    lora.init(jax.random.key(2), params, X)


_ON_A_MESH = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tests.methods import test_table as table

mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
place = lambda *spec: NamedSharding(mesh, P(*spec))
x = np.random.default_rng(0).normal(size=(4, table.WIDTH)).astype("f4")
for name in table.NAMES:
  lora, _, params, adapter = table.start(name, "scanned")
  adapter = table.perturbed(adapter)
  apply = jax.jit(lora.apply)
  want = apply(params, adapter, x)
  sharded = {"kernel": jax.device_put(params["kernel"], place(None, "fsdp", "tensor"))}
  got = apply(sharded, adapter, jax.device_put(x, place("data")))
  np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)
"""


def test_a_mesh_of_eight_devices_makes_no_difference():
  root = Path(__file__).parents[2]
  environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
  done = subprocess.run(
    [sys.executable, "-c", _ON_A_MESH], cwd=root, env=environment, check=False
  )
  assert done.returncode == 0


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    (
      "c3a",
      {"options": {"block_size": 5}},
      "block_size=5 does not divide the 12 in.*4",
    ),
    ("c3a", {"rank": 4}, "rank does nothing in c3a.*block_size"),
    (
      "oft",
      {"options": {"block_size": 5}},
      "block_size=5 does not divide.*; [46] does",
    ),
    ("hra", {"rank": 3}, "even rank, not 3 at 'kernel': choose 4"),
    ("miss", {"rank": 13}, "rank 13 is above the 12 inputs"),
    ("vera", {"alpha": 3.0}, "alpha=3 does nothing in vera"),
    (
      "vera",
      {"options": {"d_initail": 1.0}},
      "option of vera.*did you mean 'd_initial'",
    ),
    (
      "supertuning",
      {"options": {"sparsity": 0.999}},
      "leaves 0 of the 144 .* from 0 to 0.993",
    ),
    ("supertuning", {"options": {"sparsity": -0.5}}, "sparsity -0.5 leaves 216 of"),
    ("fourierft", {"options": {"n_frequency": 145}}, "from 1 to the 144"),
    ("gralora", {"rank": 3, "options": {"k": 2}}, "k=2 does not divide rank=3"),
    ("pissa", {"rank": 13}, "rank 13 is above the smaller side.*choose 12 or less"),
    ("pissa", {"dropout": 0.1}, "pissa has no dropout, not 0.1"),
    ("lora_ga", {"rank": 2}, "starts from gradients .*init_from_gradients, or pissa"),
    ("lora_ga", {"rank": 7}, "takes 14 directions of.*which has 12: choose 6 or less"),
    ("corda", {"rank": 2}, "starts from the inputs .*init_from_activations"),
    ("corda", {"rank": 13}, "rank 13 is above the smaller side.*choose 12 or less"),
    ("olora", {"init": "gaussian"}, "init='gaussian' does nothing in olora"),
    ("lora", {"init": "orthogonal", "rank": 3}, "needs an even rank.*not 3 at 'kern"),
    ("shira", {"rank": 7}, "rank 7 is 168 numbers, above the 144.*choose 6 or less"),
    ("ia3", {"rank": 4}, "rank does nothing in ia3.*feedforward"),
    (
      "ia3",
      {"options": {"feedforward": ("kernle",)}},
      "'kernle' matches nothing.*kern",
    ),
    ("vblora", {}, "vector_length=256 does not divide the 12 inputs.*; 12 does"),
    (
      "vblora",
      {"options": {"vector_length": 4, "num_vectors": 5, "topk": 6}},
      "topk=6 must be from 1 to num_vectors=5",
    ),
    ("randlora", {"rank": 0}, "rank .* must be an int >= 1"),
    ("lokr", {"rank": 2}, r"rank 2 of the factor of shape \(4, 4\).*choose 1 or less"),
  ],
)
def test_what_a_method_does_not_allow_is_refused_with_the_reason(name, fields, message):
  params = {"kernel": KERNELS[0]}

  def make():
    config = lx.LoraConfig(targets="kernel", method=name, **fields)
    lx.adapt(single, config).init(jax.random.key(0), params, X)

  with pytest.raises(lx.LoraxError, match=message):
    make()


def test_a_method_that_is_not_defined_for_tables_says_so():
  config = peers.config("loha")
  with pytest.raises(lx.LoraxError, match=r"looked up.*not defined for tables"):
    lx.adapt(lambda p, i: p["kernel"][i], config).init(
      jax.random.key(0), {"kernel": KERNELS[0]}, np.array([1, 2])
    )


def test_every_method_is_in_the_table():
  assert peers.kernel_methods() - {"lora_bias"} == {*map(method, NAMES)}

"""Mixtures of experts against transformers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict

import lorax_flax as lx
from lorax_flax import quant
from lorax_flax.adapt.paths import flatten
from lorax_flax.models import registry
from lorax_flax.models.llama.config import DecoderConfig
from lorax_flax.models.llama.moe import Mixture
from tests.adapt.checks import all_equations, perturbed
from tests.models import family
from tests.models.decoders import BATCH, Peer, batch, check_equals_peer, real

PEERS = {
  "mixtral": Peer(
    "Mixtral",
    {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 5},
  ),
  "qwen3_moe": Peer(
    "Qwen3Moe",
    {
      "num_experts": 4,
      "num_experts_per_tok": 3,
      "moe_intermediate_size": 12,
      "num_attention_heads": 3,
      "num_key_value_heads": 1,
      "head_dim": 6,
      "norm_topk_prob": False,
      "mlp_only_layers": [],
    },
  ),
  "qwen3_moe, normed": Peer(
    "Qwen3Moe",
    {
      "num_experts": 4,
      "num_experts_per_tok": 2,
      "norm_topk_prob": True,
      "attention_bias": True,
      "tie_word_embeddings": True,
      "use_sliding_window": True,
      "sliding_window": 3,
    },
  ),
}


@pytest.mark.parametrize("name", PEERS)
def test_logits_equal_transformers_scanned_or_not(tmp_path, name):
  left = check_equals_peer(tmp_path, PEERS[name].save(tmp_path))
  assert set(left.values()) <= {"norm", "raw"}, left
  assert "model.layers.0.mlp.gate" in left


def stored_keys(folder):
  return set(safetensors.numpy.load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(
  ("name", "key", "scan"),
  [
    ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w3.weight", True),
    ("qwen3_moe", "model.layers.1.mlp.experts.3.up_proj.weight", False),
  ],
)
def test_experts_are_read_in_one_tensor_or_apart(tmp_path, name, key, scan):
  model = PEERS[name].save(tmp_path / "base")
  assert key in stored_keys(tmp_path / "base")
  family.check_round_trip(tmp_path / "base", tmp_path / "out", model, scan=scan)
  assert "model.layers.1.mlp.experts.gate_up_proj" in stored_keys(tmp_path / "out")
  one, other = (registry.load(tmp_path / n, scan=scan) for n in ("base", "out"))
  jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_gradients_equal_torch_with_scan_and_remat(tmp_path):
  model = PEERS["mixtral"].save(tmp_path)
  options = {"scan": True, "remat": "full", "real": real}
  family.check_gradients(tmp_path, model, BATCH, **options)


def test_lora_has_a_pair_of_factors_for_each_expert(tmp_path):
  PEERS["mixtral"].save(tmp_path, num_hidden_layers=1)
  loaded = registry.load(tmp_path, scan=True)
  layer = "model/layers"
  want = [f"{layer}/self_attn/{name}_proj/kernel" for name in "qkvo"]
  experts = [f"{layer}/mlp/experts/{name}_proj" for name in ("gate_up", "down")]
  family.check_lora(loaded, batch(7, 5), [*want, *experts, f"{layer}/mlp/gate/weight"])

  def apply_fn(params, inputs):
    return loaded.module.apply({"params": params}, **inputs)

  adapter = lx.adapt(apply_fn, lx.LoraConfig(rank=2, targets=experts)).init(
    jax.random.key(0), loaded.params, batch(3)
  )
  for path in experts:
    assert adapter[path].roles == ("stack", "stack", "in", "out")


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_experts_per_tok": 6}, "num_experts_per_tok 6 of num_experts 5"),
    ({"num_local_experts": 0}, "num_experts must be a positive integer"),
    ({"num_experts": 7}, "two values of one field"),
    ({"mlp_only_layers": [1]}, "mlp_only_layers"),
    ({"output_router_logits": True}, "output_router_logits"),
  ],
)
def test_a_config_that_we_cannot_honour_is_an_error(tmp_path, fields, message):
  PEERS["mixtral"].save(tmp_path)
  family.change_config(tmp_path, **fields)
  with pytest.raises(lx.LoraxError, match=message):
    registry.load(tmp_path)


def test_a_lost_expert_is_an_error(tmp_path):
  PEERS["mixtral"].save(tmp_path)
  path = tmp_path / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  del tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
  with pytest.raises(lx.LoraxError, match=r"lacks 1 keys: .*experts\.3\.w3\.weight"):
    registry.load(tmp_path)


CONFIG = DecoderConfig(
  model_type="mixtral",
  vocab_size=11,
  hidden_size=6,
  intermediate_size=10,
  num_hidden_layers=1,
  num_attention_heads=1,
  hidden_act="silu",
  max_position_embeddings=8,
  rms_norm_eps=1e-5,
  tie_word_embeddings=False,
  num_experts=5,
  num_experts_per_tok=2,
)
UP, DOWN, GATE = "experts/gate_up_proj", "experts/down_proj", "gate/weight"


def mixture(params, x):
  return Mixture(CONFIG, x.dtype).apply({"params": unflatten_dict(params, sep="/")}, x)


def dense(params, x):
  """Every expert on every token, with weight zero where it was not chosen."""
  probs = jax.nn.softmax((x @ params[GATE]).astype(jnp.float32))
  top, chosen = jax.lax.top_k(probs, CONFIG.num_experts_per_tok)
  one_hot = jax.nn.one_hot(chosen, CONFIG.num_experts)
  weights = jnp.einsum("btc,btce->bte", top / top.sum(-1, keepdims=True), one_hot)
  gate, up = jnp.split(jnp.einsum("btd,edf->ebtf", x, params[UP]), 2, axis=-1)
  y = jnp.einsum("ebtm,emd->ebtd", jax.nn.silu(gate) * up, params[DOWN])
  return jnp.einsum("ebtd,bte->btd", y, weights).astype(x.dtype)


@pytest.fixture(scope="module", params=["spread", "two experts of five"])
def mixed(request):
  """(parameters, tokens) of which experts get any number, or two get all."""
  x = jax.random.normal(jax.random.key(1), (3, 7, CONFIG.hidden_size))
  params = flatten(Mixture(CONFIG, jnp.float32).init(jax.random.key(0), x)["params"])
  params = {p: 10 * w for p, w in nn.meta.unbox(params).items()}
  if request.param != "spread":
    x = x.at[..., 0].set(10.0)
    params[GATE] = params[GATE].at[0].set(jnp.array([0.0, 9.0, 0.0, 0.0, 5.0]))
  return params, x


def loss_of(fn):
  return lambda *args: (jnp.sin(fn(*args)).sum(), fn(*args))


def check_same(got, want):
  """To 1e-5 of an array's largest number."""

  def check(g, w):
    scale = max(1.0, float(abs(w).max()))
    np.testing.assert_allclose(g / scale, w / scale, atol=1e-5)

  jax.tree.map(check, got, want)


def test_a_mixture_equals_its_dense_form(mixed):
  run = lambda fn: jax.jit(jax.grad(loss_of(fn), (0, 1), has_aux=True))(*mixed)
  check_same(run(mixture), run(dense))
  params, x = jax.tree.map(lambda t: t.astype(jnp.bfloat16), mixed)
  narrow, wide = (t.astype(jnp.float32) for t in (mixture(params, x), dense(*mixed)))
  np.testing.assert_allclose(narrow, wide, atol=0.02 * float(abs(wide).max()))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "int8"])
def test_adapted_experts_equal_the_merged_dense_form(mixed, method):
  params, x = mixed
  options = {"rank": 2}
  if method == "ia3":
    options = {"options": {"feedforward": [DOWN]}}
  name = "lora" if method == "int8" else method
  config = lx.LoraConfig(method=name, targets=[UP, DOWN], **options)
  lora = lx.adapt(mixture, config)
  adapter = perturbed(lora.init(jax.random.key(2), params, x))
  stored = dict(params)
  if method == "int8":
    stored |= {p: quant.quantize(params[p], "int8") for p in (UP, DOWN)}
    params = params | {p: stored[p].dense() for p in (UP, DOWN)}
  trained, rest = lx.partition(adapter, lx.trainable_mask(adapter))
  whole = lambda t: lx.combine(t, rest)
  follow = loss_of(lambda t, x: lora.apply(stored, whole(t), x))
  merged = loss_of(lambda t, x: dense(lx.merge(params, whole(t)), x))
  run = lambda fn: jax.jit(jax.grad(fn, (0, 1), has_aux=True))(trained, x)
  check_same(run(follow), run(merged))
  if method == "lora":
    # No expert's kernel has a gradient, nor is one transposed.
    jaxpr = jax.make_jaxpr(lambda t: jax.grad(follow, has_aux=True)(t, x))(trained)
    made = {
      out.aval.shape
      for eqn in all_equations(jaxpr)
      for out in eqn.outvars
      if eqn.primitive.name in ("ragged_outer", "transpose", "dot_general")
    }
    for e, i, o in (params[UP].shape, params[DOWN].shape):
      assert not made & {(e, i, o), (e, o, i)}
    # Nor has an array the gate of each row beside its other half, written to be read.
    of_rows = {out.aval.shape for eqn in all_equations(jaxpr) for out in eqn.outvars}
    wide = params[UP].shape[2]
    assert not [shape for shape in of_rows if len(shape) == 2 and shape[1] == wide]


def test_several_adapters_of_experts_equal_each_alone(mixed):
  params, x = mixed
  lora = lx.adapt(mixture, lx.LoraConfig(rank=2, targets=[UP, DOWN, GATE]))
  first = perturbed(lora.init(jax.random.key(2), params, x))
  adapters = [first, jax.tree.map(lambda t: 2 * t, first)]
  stacked = jax.tree.map(lambda *ts: jnp.stack(ts), *adapters)
  both = jax.vmap(lora.apply, (None, 0, None))(params, stacked, x)
  check_same(both, jnp.stack([lora.apply(params, a, x) for a in adapters]))

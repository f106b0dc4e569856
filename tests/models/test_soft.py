"""Prefixes and prompts against PEFT, on decoders."""

import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from jax.sharding import AbstractMesh, PartitionSpec

import lorax_flax as lx
from lorax_flax.adapt.config import with_tuned
from lorax_flax.adapt.paths import flatten
from lorax_flax.hub.adapters import any as adapters
from lorax_flax.hub.peft import folder
from lorax_flax.methods import Tuned
from lorax_flax.models import layers, ops, registry, with_adapter
from lorax_flax.models.soft import SoftSettings
from lorax_flax.serve import decoder
from lorax_flax.sharding import mesh
from tests.adapt import checks
from tests.models import decoders, family, soft_peers
from tests.models.soft_peers import LENGTH, settings

pytestmark = [
  # PEFT calls transformers by names that these are about.
  pytest.mark.filterwarnings("ignore::FutureWarning"),
  pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT"),
]

CASES = [(n, m) for n in ("llama", "mistral", "gpt2") for m in ("prefix", "prompt")]
BATCH = decoders.batch(9, 5)


class Pair:
  """A model in PEFT's, its folder, and ours of both."""

  def __init__(self, name, method, where):
    self.name, self.method, self.where = name, method, where
    self.base = soft_peers.save(name, where / "base")
    self.peft = soft_peers.wrapped(self.base, method)
    self.peft.save_pretrained(where / "adapter")

  def ours(self):
    loaded, saved = with_adapter.load(str(self.where / "base"), self.where / "adapter")
    return loaded, saved

  def logits(self, inputs=BATCH):
    with torch.no_grad():
      tensors = {k: torch.tensor(x).long() for k, x in inputs.items()}
      return self.cut(self.peft(**tensors).logits).numpy()

  def cut(self, logits):
    """PEFT's logits have places for the prompt's tokens too."""
    return logits[:, LENGTH:] if self.method == "prompt" else logits


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def pair(request, tmp_path_factory):
  return Pair(*request.param, tmp_path_factory.mktemp("pair"))


def real(logits, inputs=BATCH):
  return np.asarray(logits)[inputs["attention_mask"] == 1]


def apply(loaded, params, inputs=BATCH):
  run = jax.jit(lambda p, inputs: loaded.module.apply({"params": p}, **inputs))
  return run(params, inputs)


def test_a_folder_of_peft_means_here_what_it_means_there(pair):
  loaded, saved = pair.ours()
  expected = real(pair.logits())
  merged = lx.merge(loaded.params, saved.adapter)
  np.testing.assert_allclose(real(apply(loaded, merged)), expected, atol=1e-5)
  scanned = registry.load(pair.where / "base", scan=True, soft=settings(pair.method))
  adapter, config = folder.read_adapter(
    pair.where / "adapter", scanned.params, scanned.keymap
  )
  assert config.targets == ()
  assert config.tuned == tuple(adapter)
  merged = lx.merge(scanned.params, adapter)
  np.testing.assert_allclose(real(apply(scanned, merged)), expected, atol=1e-5)
  # And it is no small part of what they compute.
  with torch.no_grad(), pair.peft.disable_adapter():
    tensors = {k: torch.tensor(x).long() for k, x in BATCH.items()}
    assert np.abs(real(pair.base(**tensors).logits) - expected).max() > 0.1


def test_a_folder_written_here_means_there_what_it_means_here(pair, tmp_path):
  loaded, saved = pair.ours()
  adapter = checks.perturbed(saved.adapter)
  folder.write_adapter(
    tmp_path, adapter, loaded.keymap, saved.config, task_type="CAUSAL_LM"
  )
  base = type(pair.base).from_pretrained(pair.where / "base")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
  with torch.no_grad():
    tensors = {k: torch.tensor(x).long() for k, x in BATCH.items()}
    theirs = pair.cut(model(**tensors).logits).numpy()
  ours = apply(loaded, lx.merge(loaded.params, adapter))
  np.testing.assert_allclose(real(ours), real(theirs), atol=1e-5)
  written = peft.PeftConfig.from_pretrained(tmp_path)
  own = pair.peft.peft_config["default"]
  for name in ("num_virtual_tokens", "token_dim", "peft_type", "task_type"):
    assert getattr(written, name) == getattr(own, name)


@pytest.mark.parametrize("prompt", [[5, 3, 9, 11, 8, 20, 7], [4]])
def test_greedy_tokens_are_those_of_peft(pair, prompt):
  """PEFT reads the full text for each token: on transformers 5 its generate, which has
  a cache, takes other positions than its forward."""
  new = 8
  loaded, saved = pair.ours()
  params = lx.merge(loaded.params, saved.adapter)
  text = list(prompt)
  for _ in range(new):
    ids = np.array([text])
    alone = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    text.append(int(pair.logits(alone)[0, -1].argmax()))
  made = decoder.decoder_of(loaded)
  # The other row has a length of its own, and the prefix all the same.
  inputs = decoder.prompts([prompt, [7, 7, 7]], most=16)
  logits, cache = made.prefill(params, inputs, loaded.blank_cache(2, 28))
  found = [jnp.argmax(logits, axis=-1)]
  for _ in range(new - 1):
    logits, cache = made.step(params, found[-1], cache)
    found.append(jnp.argmax(logits, axis=-1))
  assert np.stack(found, axis=1)[0].tolist() == text[len(prompt) :]
  np.testing.assert_array_equal(cache.lengths_B, [len(prompt) + new - 1, 3 + new - 1])


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_three_steps_with_lora_beside_equal_pefts(method, tmp_path):
  """In torch, a prefix around a model whose layers are LoRA's; both train."""
  base = soft_peers.save("llama", tmp_path / "base")
  config = peft.LoraConfig(
    task_type="CAUSAL_LM",
    r=2,
    lora_alpha=4,
    target_modules=["q_proj", "v_proj"],
    init_lora_weights=False,
  )
  factors = peft.get_peft_model(base, config)
  wrapped = soft_peers.wrapped(factors.base_model.model, method)
  weights = {n: p for n, p in wrapped.named_parameters() if "lora_" in n}
  for weight in weights.values():
    weight.requires_grad = True
  loaded = registry.load(tmp_path / "base", soft=settings(method))

  def theirs(name):
    """Both folders of PEFT as one adapter of ours."""
    found = {}
    for model in (factors, wrapped):
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / name)
      found |= adapters.read(tmp_path / name, loaded.params, loaded.keymap).adapter
    return found

  adapter = theirs("start")
  lora = lx.adapt(
    lambda params, inputs: loaded.module.apply({"params": params}, **inputs),
    lx.LoraConfig(targets=["q_proj", "v_proj"], tuned=loaded.soft_paths, rank=2),
  )
  made = lora.init(jax.random.key(0), loaded.params, BATCH)
  assert {p: type(d) for p, d in made.items()} == {
    p: type(d) for p, d in adapter.items()
  }
  where = np.nonzero(BATCH["attention_mask"])
  trained, rest = lx.partition(adapter, lx.trainable_mask(adapter))

  def loss(trained):
    logits = lora.apply(loaded.params, lx.combine(trained, rest), BATCH)
    return jnp.sin(logits[where]).sum()

  tx = optax.adam(1e-2)
  state, step = tx.init(trained), jax.jit(jax.grad(loss))
  optimizer = torch.optim.Adam(
    [p for p in wrapped.parameters() if p.requires_grad], lr=1e-2
  )
  tensors = {k: torch.tensor(x).long() for k, x in BATCH.items()}
  for _ in range(3):
    with jax.numpy_dtype_promotion("standard"):  # of optax's own
      updates, state = tx.update(step(trained), state)
    trained = optax.apply_updates(trained, updates)
    optimizer.zero_grad()
    logits = wrapped(**tensors).logits
    logits = logits[:, LENGTH:] if method == "prompt" else logits
    torch.sin(logits[where]).sum().backward()
    optimizer.step()
  after = theirs("after")
  for path, delta in lx.combine(trained, rest).items():
    for name in delta.trained:
      got, start = delta.leaves()[name], adapter[path].leaves()[name]
      expected = after[path].leaves()[name]
      np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=path)
      assert np.abs(np.asarray(got) - start).max() > 1e-3


@pytest.mark.parametrize("method", ["prefix", "prompt", "houlsby"])
def test_all_linear_means_the_bases_layers(method, tmp_path):
  soft_peers.save("llama", tmp_path)
  config = lx.LoraConfig(targets="all-linear")
  found = []
  for soft in (None, SoftSettings(method)):
    loaded = registry.load(tmp_path, soft=soft)
    family.check_axes(loaded)
    run = lambda params, inputs, loaded=loaded: loaded.module.apply(
      {"params": params}, **inputs
    )
    own = with_tuned(config, loaded.soft_paths)
    found.append(lx.adapt(run, own).plan(loaded.params, BATCH))
  plain, soft = ([t.path for t in plan.targets] for plan in found)
  assert plain == soft
  assert found[1].tuned
  assert not set(found[1].left_out) - set(found[0].left_out)


def test_states_are_sharded_as_what_they_stand_beside(tmp_path):
  soft_peers.save("llama", tmp_path)
  devices = AbstractMesh((1, 2, 2, 1, 1), mesh.AXES)
  expected = {
    "prefix": {"prefix/states": PartitionSpec(None, None, None, "tensor")},
    "prompt": {"prompt/embedding": PartitionSpec(None, "fsdp")},
  }
  for method, specs in expected.items():
    loaded = registry.load(tmp_path, soft=settings(method))
    axes = mesh.names_by_path(loaded.family.logical_axes(loaded.module))
    leaves = flatten(loaded.params)
    adapter = {path: Tuned.start(leaves[path]) for path in loaded.soft_paths}
    found = mesh.of_adapter(devices, axes, adapter)
    assert {path: delta.value.spec for path, delta in found.items()} == specs


def test_packed_texts_see_the_same_states_as_each_alone(tmp_path):
  soft_peers.save("llama", tmp_path)
  rows = [[5, 3, 9], [11, 8, 20, 7]]
  for method in ("prefix", "prompt"):
    loaded = registry.load(tmp_path, soft=settings(method))
    packed = {
      "input_ids": np.array([[*rows[0], *rows[1]]], np.int32),
      "attention_mask": np.array([[1] * 3 + [2] * 4], np.int32),
      "position_ids": np.array([[0, 1, 2, 0, 1, 2, 3]], np.int32),
    }
    got = np.asarray(apply(loaded, loaded.params, packed))[0]
    for row, part in zip(rows, (got[:3], got[3:]), strict=True):
      ids = np.array([row], np.int32)
      alone = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
      expected = apply(loaded, loaded.params, alone)[0]
      np.testing.assert_allclose(part, expected, atol=1e-5)
      base = registry.load(tmp_path)
      assert np.abs(apply(base, base.params, alone)[0] - expected).max() > 0.1


def test_no_kernel_takes_keys_that_every_segment_has(monkeypatch):
  """A TPU's kernel lets a query attend to its own segment alone."""
  q = jax.random.normal(jax.random.key(0), (1, 128, 2, 4))
  mask = jnp.ones((1, 128), jnp.int32)
  expected = ops.attention(q, q, q, mask, causal=True)
  module = sys.modules["lorax_flax.models.ops.attention"]
  monkeypatch.setattr(module.devices, "platform", lambda: "tpu")
  kernel = lambda *args, **options: pytest.fail("the kernel")
  monkeypatch.setattr(module.splash, "attention", kernel)
  mask = mask.at[:, :3].set(layers.EVERY_SEGMENT)
  got = ops.attention(q, q, q, mask, causal=True, shared=True)
  np.testing.assert_allclose(got[:, 3:], expected[:, 3:], atol=1e-6)


def test_packed_texts_with_windows_are_refused(tmp_path):
  soft_peers.save("mistral", tmp_path)
  loaded = registry.load(tmp_path, soft=settings("prefix"))
  ids = np.zeros((1, 4), np.int32)
  with pytest.raises(lx.LoraxError, match=r"soft\.method=prefix with packed texts"):
    loaded.module.apply({"params": loaded.params}, ids, ids + 1, ids)


def test_the_places_of_a_model_are_shared(tmp_path):
  soft_peers.save("gpt2", tmp_path)
  loaded = registry.load(tmp_path, soft=settings("prompt"))
  assert loaded.max_length == 48 - LENGTH
  ids = np.zeros((1, 45), np.int32)
  with pytest.raises(lx.LoraxError, match="45 tokens: the model takes at most 44"):
    loaded.module.apply({"params": loaded.params}, ids, ids + 1)
  with pytest.raises(lx.LoraxError, match="45 tokens: the model takes at most 44"):
    loaded.blank_cache(1, 45)


def test_settings_that_mean_nothing_are_refused(tmp_path):
  with pytest.raises(lx.LoraxError, match=r"'prefixes'.*prefix"):
    SoftSettings(method="prefixes")
  with pytest.raises(lx.LoraxError, match=r"soft\.size does nothing.*soft\.length"):
    SoftSettings(method="prefix", size=3)
  with pytest.raises(lx.LoraxError, match=r"soft\.length does nothing.*no other field"):
    SoftSettings(length=3)
  with pytest.raises(lx.LoraxError, match=r"soft\.length is 0"):
    SoftSettings(method="prompt", length=0)
  hf_config = {"model_type": "vit"}
  with pytest.raises(
    lx.LoraxError, match=r"soft\.method=prompt is not built for a vit"
  ):
    registry.outline(hf_config, soft=settings("prompt"))


def test_starts_are_pefts_and_of_the_seed(tmp_path):
  soft_peers.save("llama", tmp_path)
  load = lambda seed, **soft: registry.load(
    tmp_path, seed=seed, soft=SoftSettings("prefix", length=50, **soft)
  )
  first = load(0)
  states = first.params["prefix"]["states"]
  assert states.shape == (2, 2, 50, 2, 4)
  assert abs(float(states.std()) - 1.0) < 0.05
  again = load(1).params["prefix"]["states"]
  np.testing.assert_array_equal(first.reseeded(1).params["prefix"]["states"], again)
  assert not np.array_equal(states, again)
  assert not load(0, std=0.0).params["prefix"]["states"].any()

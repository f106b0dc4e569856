"""Prefixes and prompts on encoders; bottleneck adapters and BitFit."""

import jax
import numpy as np
import pytest
import torch
import transformers

import lorax_flax as lx
from lorax_flax.models import registry, with_adapter
from lorax_flax.models.soft import SoftSettings
from tests.models import decoders, family, peers, soft_peers

pytestmark = [
  # PEFT calls transformers by names that these are about.
  pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ENCODERS = pytest.mark.parametrize("name", ["bert", "roberta"])


def logits(loaded, params, inputs):
  run = jax.jit(lambda p, inputs: loaded.module.apply({"params": p}, **inputs))
  return np.asarray(run(params, inputs))


@ENCODERS
def test_a_prompt_on_an_encoder_is_pefts(name, tmp_path):
  model = peers.save(tmp_path / "base", name)
  wrapped = soft_peers.wrapped(model, "prompt", "SEQ_CLS")
  wrapped.save_pretrained(tmp_path / "adapter")
  inputs = peers.batch(name)
  loaded, saved = with_adapter.load(str(tmp_path / "base"), tmp_path / "adapter")
  assert {type(delta) for delta in saved.adapter.values()} == {lx.methods.Tuned}
  got = logits(loaded, lx.merge(loaded.params, saved.adapter), inputs)
  np.testing.assert_allclose(got, family.torch_logits(wrapped, inputs), atol=1e-5)
  assert np.abs(got - family.torch_logits(model, inputs)).max() > 0.05


@ENCODERS
@pytest.mark.parametrize("scan", [False, True])
def test_a_prefix_on_an_encoder_is_what_a_cache_before_the_text_is(
  name, scan, tmp_path
):
  """PEFT 0.21 has none on transformers 5; theirs is a cache filled by hand."""
  model = peers.save(tmp_path, name)
  inputs = peers.batch(name)
  soft = SoftSettings("prefix", length=4)
  loaded = registry.load(tmp_path, soft=soft, scan=scan)
  states = np.asarray(loaded.params["prefix"]["states"])
  rows = len(inputs["input_ids"])
  cache = transformers.DynamicCache()
  for layer, both in enumerate(states):
    k, v = (torch.tensor(np.repeat(x.swapaxes(0, 1)[None], rows, axis=0)) for x in both)
    cache.update(k, v, layer)
  tensors = {k: torch.tensor(x).long() for k, x in inputs.items()}
  mask = torch.cat([torch.ones(rows, 4).long(), tensors["attention_mask"]], dim=1)
  with torch.no_grad():
    body = getattr(model, name)
    out = body(**(tensors | {"attention_mask": mask}), cache=cache)
    pooled = out.pooler_output if name == "bert" else out.last_hidden_state
    expected = model.classifier(pooled).numpy()
  got = logits(loaded, loaded.params, inputs)
  np.testing.assert_allclose(got, expected, atol=1e-5)
  assert np.abs(got - family.torch_logits(model, inputs)).max() > 0.05


# Of each family: the torch modules whose outputs the two adapters change.
PLACES = {
  "bert": ("bert.encoder.layer.{}.attention.output.dropout", "bert.encoder.layer.{}"
           ".output.dropout"),
  "gpt2": ("transformer.h.{}.attn", "transformer.h.{}.mlp"),
  "llama": ("model.layers.{}.self_attn", "model.layers.{}.mlp"),
}  # fmt: skip
PATHS = {
  "bert": ("encoder/layer_{}/attention/attention_adapter", "encoder/layer_{}"
           "/mlp_adapter"),
  "gpt2": ("layer_{}/attention_adapter", "layer_{}/mlp_adapter"),
  "llama": ("model/layer_{}/attention_adapter", "model/layer_{}/mlp_adapter"),
}  # fmt: skip


def leaf_of(params, path):
  for name in path.split("/"):
    params = params[name]
  return params


def hook(adapter):
  """Adds the formula, x + up(relu(down(x))), to what a module gives."""
  down, up = (
    {n: torch.tensor(np.asarray(adapter[name][n])) for n in ("kernel", "bias")}
    for name in ("down", "up")
  )

  def change(module, args, output):
    x = output[0] if isinstance(output, tuple) else output
    inside = torch.relu(x @ down["kernel"] + down["bias"])
    y = x + inside @ up["kernel"] + up["bias"]
    return (y, *output[1:]) if isinstance(output, tuple) else y

  return change


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
def test_bottleneck_adapters_are_the_papers_formula(name, method, tmp_path):
  save = peers.save if name == "bert" else None
  model = save(tmp_path) if save else soft_peers.save(name, tmp_path)
  inputs = peers.batch() if name == "bert" else decoders.batch(9, 9)
  loaded = registry.load(tmp_path, soft=SoftSettings(method, size=3))
  layers = model.config.num_hidden_layers
  count = {"houlsby": 2, "pfeiffer": 1}[method]
  assert len(loaded.soft_paths) == layers * count * 4
  # At its start it is the base.
  np.testing.assert_allclose(
    logits(loaded, loaded.params, inputs), family.torch_logits(model, inputs), atol=1e-5
  )
  rng = np.random.default_rng(0)
  changed = {p: rng.normal(0, 0.3, leaf_of(loaded.params, p).shape).astype(np.float32)
             for p in loaded.soft_paths}  # fmt: skip
  params = lx.merge(
    loaded.params,
    {p: lx.methods.Tuned(x, leaf_of(loaded.params, p)) for p, x in changed.items()},
  )
  for layer in range(layers):
    for place, path in list(zip(PLACES[name], PATHS[name], strict=True))[-count:]:
      module = model.get_submodule(place.format(layer))
      module.register_forward_hook(hook(leaf_of(params, path.format(layer))))
  got, expected = logits(loaded, params, inputs), family.torch_logits(model, inputs)
  np.testing.assert_allclose(got, expected, atol=2e-5)
  scanned = registry.load(tmp_path, soft=SoftSettings(method, size=3), scan=True)
  assert sum(x.size for x in changed.values()) == sum(
    leaf_of(scanned.params, p).size for p in scanned.soft_paths
  )


def test_bitfit_trains_the_biases_alone(tmp_path):
  """BitFit (arXiv 2106.10199): every bias and the head; all else stays."""
  model = peers.save(tmp_path)
  loaded, inputs = registry.load(tmp_path), peers.batch()
  run = lambda params, inputs: loaded.module.apply({"params": params}, **inputs)
  config = lx.LoraConfig(targets=(), bias="all", tuned=["classifier"])
  adapter = lx.adapt(run, config).init(jax.random.key(0), loaded.params, inputs)
  expected = {
    name
    for name, _ in model.named_parameters()
    if name.endswith(".bias") or name.startswith("classifier.")
  }
  keys = {key for path in adapter for key in lx_keys(loaded, path)}
  assert keys == expected
  assert {type(delta) for delta in adapter.values()} == {lx.methods.Tuned}


def lx_keys(loaded, path):
  from lorax_flax.hub.checkpoints import keymap as km

  return km.path_to_keys(loaded.keymap, path)

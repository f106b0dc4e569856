"""Prefixes and prompts on encoders; bottleneck adapters and BitFit."""

import sys

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

import lorax_flax as lx
from lorax_flax.hub.peft import folder
from lorax_flax.models import registry, with_adapter
from lorax_flax.models.soft import SoftSettings
from tests.models import (
  decoders,
  family,
  peers,
  soft_peers,
  test_deberta,
  test_distilbert,
  test_t5,
)

pytestmark = [
  # PEFT calls transformers by names that these are about.
  pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ENCODERS = pytest.mark.parametrize("name", ["bert", "roberta"])


def logits(loaded, params, inputs):
  run = jax.jit(lambda p, inputs: loaded.module.apply({"params": p}, **inputs))
  return np.asarray(run(params, inputs))


def saved_encoder(name, folder):
  """A random model in a folder, and inputs of it."""
  if name == "distilbert":
    return test_distilbert.save(folder), test_distilbert.batch()
  if name == "deberta-v2":
    return test_deberta.save(folder, test_deberta.V2), peers.batch()
  return peers.save(folder, name), peers.batch(name)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "deberta-v2"])
def test_a_prompt_on_an_encoder_is_pefts(name, tmp_path):
  model, inputs = saved_encoder(name, tmp_path / "base")
  # PEFT finds no sizes under DistilBERT's names of them.
  sizes = {"token_dim": 12, "num_attention_heads": 3} if name == "distilbert" else {}
  wrapped = soft_peers.wrapped(model, "prompt", "SEQ_CLS", **sizes)
  wrapped.save_pretrained(tmp_path / "adapter")
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


def test_a_prefix_on_distilbert_is_before_the_keys_and_values(tmp_path, monkeypatch):
  """Transformers has no cache for it: theirs is put into attention by hand."""
  model, inputs = saved_encoder("distilbert", tmp_path)
  loaded = registry.load(tmp_path, soft=SoftSettings("prefix", length=4))
  states = iter(torch.tensor(np.asarray(loaded.params["prefix"]["states"])))

  def attend(module, q, k, v, mask, *args, **kwargs):
    own = (x.permute(1, 0, 2)[None].expand(len(q), -1, -1, -1) for x in next(states))
    k, v = (torch.cat([x, y], dim=2) for x, y in zip(own, (k, v), strict=True))
    seen = torch.tensor(inputs["attention_mask"]) != 0
    seen = torch.nn.functional.pad(seen, (4, 0), value=True)[:, None, None]
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return y.transpose(1, 2), None

  module = sys.modules[type(model).__module__]
  monkeypatch.setattr(
    module.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *args: attend
  )
  # The tokens' positions go on after the prefix's.
  rows = model.distilbert.embeddings.position_embeddings.weight
  rows.data = torch.roll(rows.data, -4, 0)
  got = logits(loaded, loaded.params, inputs)
  np.testing.assert_allclose(got, family.torch_logits(model, inputs), atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_a_prompt_of_a_t5_is_before_the_encoders_text_as_pefts(scan, tmp_path):
  model, inputs = test_t5.save(tmp_path / "base"), test_t5.batch(9, 5)
  wrapped = soft_peers.wrapped(model, "prompt", "SEQ_2_SEQ_LM")
  wrapped.save_pretrained(tmp_path / "adapter")
  expected = family.torch_logits(wrapped, inputs)
  base = family.torch_logits(model, inputs)
  loaded = registry.load(
    tmp_path / "base", scan=scan, soft=soft_peers.settings("prompt")
  )
  adapter, config = folder.read_adapter(
    tmp_path / "adapter", loaded.params, loaded.keymap
  )
  params = lx.merge(loaded.params, adapter)
  real = test_t5.real(inputs)
  got = logits(loaded, params, inputs)[real]
  np.testing.assert_allclose(got, expected[real], atol=1e-4)
  assert np.abs(expected - base).max() > 0.05
  # What is written here means the same there.
  folder.write_adapter(
    tmp_path / "ours", adapter, loaded.keymap, config, task_type="SEQ_2_SEQ_LM"
  )
  again = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
  theirs = family.torch_logits(again, inputs)
  np.testing.assert_allclose(theirs[real], expected[real], atol=1e-5)
  # One token at a time, the encoder's text and the prompt from the cache.
  text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
  cache = loaded.blank_cache(4, 5, 9)
  step = jax.jit(
    lambda ids, cache, text: loaded.module.apply(
      {"params": params}, **text, decoder_input_ids=ids, cache=cache
    )
  )
  full = logits(
    loaded, params, text | {"decoder_input_ids": inputs["decoder_input_ids"]}
  )
  for i in range(3):
    ids = inputs["decoder_input_ids"][:, i : i + 1]
    out, cache = step(ids, cache, text if i == 0 else {})
    np.testing.assert_allclose(out[:, 0], full[:, i], atol=1e-4)


def test_a_prefix_where_a_family_has_none_is_refused_by_name():
  for name, kept in (
    ("t5", "has prompt:"),
    ("deberta-v2", "has .*houlsby"),
    ("vit", "no"),
  ):
    with pytest.raises(
      lx.LoraxError, match=rf"prefix is not built for a {name}, .*{kept}"
    ):
      registry.outline({"model_type": name}, soft=SoftSettings("prefix"))


# Of each family: the torch modules whose outputs the two adapters change.
PLACES = {
  "bert": ("bert.encoder.layer.{}.attention.output.dropout", "bert.encoder.layer.{}"
           ".output.dropout"),
  "distilbert": ("distilbert.transformer.layer.{}.attention", "distilbert.transformer"
                 ".layer.{}.ffn"),
  "deberta-v2": ("deberta.encoder.layer.{}.attention.output.dropout", "deberta.encoder"
                 ".layer.{}.output.dropout"),
  "gpt2": ("transformer.h.{}.attn", "transformer.h.{}.mlp"),
  "llama": ("model.layers.{}.self_attn", "model.layers.{}.mlp"),
}  # fmt: skip
PATHS = {
  "bert": ("encoder/layer_{}/attention/attention_adapter", "encoder/layer_{}"
           "/mlp_adapter"),
  "distilbert": ("transformer/layer_{}/attention_adapter", "transformer/layer_{}"
                 "/mlp_adapter"),
  "deberta-v2": ("encoder/layer_{}/attention/attention_adapter", "encoder/layer_{}"
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
  if name in soft_peers.MODELS:
    model, inputs = soft_peers.save(name, tmp_path), decoders.batch(9, 9)
  else:
    model, inputs = saved_encoder(name, tmp_path)
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

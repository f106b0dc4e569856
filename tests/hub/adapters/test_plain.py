"""Files of other tools: theirs are read to their logits, ours are what they write.

written/ holds files that the tools themselves wrote, each with the tool's own logits;
the scripts beside them say how.
"""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorax_flax as lx
from experiments.convert import convert
from lorax_flax.errors import LoraxError
from lorax_flax.hub.adapters import any as adapters
from lorax_flax.hub.adapters import mlx, plain, torchtune, trees, tunix
from lorax_flax.hub.files import torch_file
from lorax_flax.methods import Tuned
from lorax_flax.models import gguf, registry, with_adapter
from tests.hub.adapters.written import base as described

WRITTEN = Path(__file__).parent / "written"
# What a tool's file does not say.
ALPHA = {"gemma": None, "mlx": None, "torchtune": 3.0, "tunix": 3.0}
QUERY = "model/layer_1/self_attn/q_proj/kernel"


def _base(folder, config):
  (folder / "config.json").write_text(json.dumps(config))
  save_file(described.weights(config), folder / "model.safetensors")
  return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return _base(tmp_path_factory.mktemp("base"), described.CONFIG)


@pytest.fixture(scope="module")
def gemma_base(tmp_path_factory):
  return _base(tmp_path_factory.mktemp("gemma_base"), described.GEMMA)


@functools.cache
def _forward(module):
  """params -> logits of the last token, one program for all forms."""
  ids = jnp.asarray([described.IDS])
  return jax.jit(lambda p: module.apply({"params": p}, ids, jnp.ones_like(ids))[0, -1])


def _logits(base, source, alpha=None):
  """Logits of the last token, and the adapter."""
  loaded, saved = with_adapter.load(base, source, alpha=alpha)
  params = lx.merge(loaded.params, saved.adapter)
  return np.asarray(_forward(loaded.module)(params)), saved


@pytest.fixture(scope="module", params=ALPHA)
def theirs(request, base, gemma_base):
  """A form, its base, its tool's folder, our logits of that, and the tool's."""
  base = gemma_base if request.param == "gemma" else base
  folder = WRITTEN / request.param
  want = np.array(json.loads((folder / "logits.json").read_text()))
  got, saved = _logits(base, folder, ALPHA[request.param])
  return request.param, base, folder, got, want, saved


def test_a_tools_adapter_has_its_logits(theirs):
  _, base, _, got, want, _ = theirs
  np.testing.assert_allclose(got, want, atol=1e-5)
  loaded = registry.load(base)
  assert np.abs(_forward(loaded.module)(loaded.params) - want).max() > 0.1


@pytest.mark.parametrize("form", ["peft", "loralib", *adapters.PLAIN])
def test_each_form_to_each_has_equal_logits(form, theirs, tmp_path):
  name, base, folder, got, _, saved = theirs
  alpha, to = ALPHA[name], tmp_path / "x"
  refused = {
    ("mlx", "torchtune"): r"unknown torchtune module 'model\.embed_tok",
    ("mlx", "tunix"): r"unknown module of Tunix's LoRA 'model\.embed_tok",
    **dict.fromkeys(
      [("mlx", "gemma"), ("torchtune", "gemma"), ("tunix", "gemma")],
      "unknown gemma model family 'llama'",
    ),
    **{
      ("gemma", tool): f"unknown {named} model family 'gemma3_text'"
      for tool, named in (("torchtune", "torchtune"), ("tunix", "Tunix"))
    },
    ("tunix", "torchtune"): r"adapts all of mlp\.w1, mlp\.w2, mlp\.w3 or none",
  }
  if (name, form) in refused:
    with pytest.raises(LoraxError, match=refused[name, form]):
      convert(base, str(folder), str(to), form, alpha=alpha)
    return
  convert(base, str(folder), str(to), form, alpha=alpha)
  assert adapters.form(to) == form
  given = saved.config.alpha if form in ("loralib", "torchtune", "tunix") else None
  again, _ = _logits(base, to, given)
  np.testing.assert_allclose(again, got, atol=1e-5)
  convert(base, str(to), str(tmp_path / "back"), name, alpha=given)
  again, _ = _logits(base, tmp_path / "back", alpha)
  np.testing.assert_allclose(again, got, atol=1e-5)


def test_torchtunes_own_file_comes_back(base, tmp_path):
  source = WRITTEN / "torchtune"
  *_, notes = convert(base, str(source), str(tmp_path / "x"), "torchtune", alpha=3.0)
  assert "lora_alpha=3, not stored there" in notes[0]
  want, got = (torch_file.read(f / torchtune.FILE) for f in (source, tmp_path / "x"))
  assert got.keys() == want.keys()
  for key, tensor in want.items():
    np.testing.assert_array_equal(got[key], tensor, err_msg=key)
  with pytest.raises(LoraxError, match="torchtune's, which does not store alpha"):
    with_adapter.load(base, source)
  # Its checkpointer of Hugging Face's models writes PEFT's files beside it.
  (tmp_path / "x" / "adapter_config.json").write_text("{}")
  assert adapters.form(tmp_path / "x") == "peft"


@pytest.mark.parametrize(
  ("left_out", "message"),
  [
    ("layers.0.attn.q_proj", r"same modules in all layers, and layer 0 lacks attn\.q"),
    ("mlp.w2", r"all of mlp\.w1, mlp\.w2, mlp\.w3 or none"),
  ],
)
def test_torchtunes_recipes_cannot_name_every_module(left_out, message, base, tmp_path):
  loaded, _ = with_adapter.load(base, WRITTEN / "torchtune", alpha=3.0)
  target = plain.Base(loaded.keymap, gguf.heads(loaded.config))
  tensors, _ = torchtune.read(WRITTEN / "torchtune", target)
  theirs = {"layers.0.attn.q_proj": "layers.0.self_attn.q_proj", "mlp.w2": "down_proj"}
  kept = {k: v for k, v in tensors.items() if theirs[left_out] not in k}
  with pytest.raises(LoraxError, match=message):
    torchtune.write(tmp_path, plain.Plain(kept, 3.0), target)


def test_mlx_lms_own_file_comes_back(base, tmp_path):
  convert(base, str(WRITTEN / "mlx"), str(tmp_path / "x"), "mlx")
  want, got = (load_file(f / mlx.FILE) for f in (WRITTEN / "mlx", tmp_path / "x"))
  assert got.keys() == want.keys()
  for key, tensor in want.items():
    np.testing.assert_array_equal(got[key], tensor, err_msg=key)
  said, ours = (
    json.loads((f / "adapter_config.json").read_text())
    for f in (WRITTEN / "mlx", tmp_path / "x")
  )
  said["lora_parameters"]["keys"].sort()
  assert ours == {name: said[name] for name in ours}


def test_mlx_lm_names_layers_apart_where_they_differ(base, tmp_path):
  """mlx-lm itself was seen to load such a folder to the same logits."""
  loaded, saved = with_adapter.load(base, WRITTEN / "mlx")
  target = plain.Base(loaded.keymap, gguf.heads(loaded.config))
  one = {QUERY.replace("1", "0"): saved.adapter[QUERY]}
  mlx.write(tmp_path, plain.of_adapter(one, target.keymap, "mlx-lm"), target)
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert config["lora_parameters"]["keys"] == ["model.layers.0.self_attn.q_proj"]
  assert config["num_layers"] == 2


def test_tunixs_own_checkpoint_comes_back(base, tmp_path):
  source = WRITTEN / "tunix"
  *_, notes = convert(base, str(source), str(tmp_path / "x"), "tunix", alpha=3.0)
  assert "lora_alpha=3, not stored there" in notes[0]
  loaded, _ = with_adapter.load(base, source, alpha=3.0)
  target = plain.Base(loaded.keymap, gguf.heads(loaded.config))
  steps = (source / "7", tmp_path / "x" / "0")
  want, got = (tunix.read(step, target)[0] for step in steps)
  assert got.keys() == want.keys()
  for key, tensor in want.items():
    np.testing.assert_array_equal(got[key], tensor, err_msg=key)
  want, got = (trees.leaves(step / "model_params") for step in steps)
  assert {k: x.shape for k, x in got.items()} == {k: x.shape for k, x in want.items()}
  with pytest.raises(LoraxError, match="tunix's, which does not store alpha"):
    with_adapter.load(base, source)


def test_gemma_adapts_all_linear_layers(gemma_base, tmp_path):
  loaded, saved = with_adapter.load(gemma_base, WRITTEN / "gemma")
  target = plain.Base(loaded.keymap, gguf.heads(loaded.config))
  some = {path: x for path, x in saved.adapter.items() if path != QUERY}
  factors = plain.of_adapter(some, loaded.keymap, "gemma")
  with pytest.raises(LoraxError, match=r"no LoRA of model\.layers\.1\.self_attn\.q_p"):
    adapters.PLAIN["gemma"].write(tmp_path, factors, target)


def test_gemmas_keys_and_values_of_other_a_are_one_lora(gemma_base, tmp_path):
  loaded, saved = with_adapter.load(gemma_base, WRITTEN / "gemma")
  key = QUERY.replace("q_proj", "k_proj")
  lora = saved.adapter[key]
  adapter = saved.adapter | {key: replace(lora, a=lora.a + 1.0)}
  target = plain.Base(loaded.keymap, gguf.heads(loaded.config))
  factors = plain.of_adapter(adapter, loaded.keymap, "gemma")
  adapters.PLAIN["gemma"].write(tmp_path, factors, target)
  again = with_adapter.load(gemma_base, tmp_path)[1].adapter
  assert again[key].a.shape[1] == 2 * lora.a.shape[1]
  _same_deltas(again, adapter)


def test_a_tree_of_one_rank_holds_modules_of_others(base, tmp_path):
  loaded, saved = with_adapter.load(base, WRITTEN / "tunix", alpha=3.0)
  lora = saved.adapter[QUERY]
  scaled = replace(lora, a=lora.a[:, :1], b=lora.b[:1], scale=2 * lora.scale)
  adapter = saved.adapter | {QUERY: scaled}
  target = plain.Base(loaded.keymap, gguf.heads(loaded.config))
  tunix.write(tmp_path, plain.of_adapter(adapter, loaded.keymap, "Tunix"), target)
  again = with_adapter.load(base, tmp_path, alpha=3.0)[1].adapter
  assert again[QUERY].a.shape == lora.a.shape
  _same_deltas(again, adapter)


def _same_deltas(got, want):
  deltas = ({k: x.scale * (x.a @ x.b) for k, x in each.items()} for each in (got, want))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *deltas)


@pytest.mark.parametrize("form", adapters.PLAIN)
def test_what_a_form_cannot_hold_is_refused_by_name(form, base):
  loaded, saved = with_adapter.load(base, WRITTEN / "mlx")
  lora = saved.adapter[QUERY]
  values = {name: getattr(lora, name) for name in ("a", "b", "scale", "roles")}
  dora = lx.DoRA(**values, magnitude=jnp.ones(8))
  biased = lx.BiasLoRA(**values, bias=jnp.ones(8))
  for delta in (dora, biased, Tuned(jnp.ones((8, 8)), jnp.ones((8, 8)))):
    message = f"LoRA alone, and {QUERY} has a {type(delta).__name__}"
    with pytest.raises(LoraxError, match=message):
      plain.of_adapter({QUERY: delta}, loaded.keymap, adapters.PLAIN[form].TOOL)


@pytest.mark.parametrize("form", ["mlx", "torchtune"])
def test_a_tool_with_one_rank_refuses_others(form, base, tmp_path):
  loaded, saved = with_adapter.load(base, WRITTEN / form, alpha=ALPHA[form])
  lora = saved.adapter[QUERY]
  adapter = {QUERY.replace("1", "0"): replace(lora, a=lora.a[:, :1], b=lora.b[:1])}
  target = plain.Base(loaded.keymap, gguf.heads(loaded.config))
  factors = plain.of_adapter(saved.adapter | adapter, loaded.keymap, form)
  with pytest.raises(LoraxError, match=r"one rank.*layers\.0\.self_attn\.q_proj \(1\)"):
    adapters.PLAIN[form].write(tmp_path, factors, target)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"fine_tune_type": "dora"}, "fine_tune_type is 'dora', and 'lora' alone"),
    ({"lora_parameters": None}, "needs a rank and a scale"),
    ({"lora_parameters": {"rank": 2, "alpha": 4}}, "needs a rank and a scale"),
    ({"lora_parameters": {"rank": 3, "scale": 4}}, r"the ranks \(2, 2\).* says 3"),
  ],
)
def test_mlx_lms_settings_that_are_not_read_are_named(fields, message, base, tmp_path):
  shutil.copytree(WRITTEN / "mlx", tmp_path / "x")
  file = tmp_path / "x" / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))
  with pytest.raises(LoraxError, match=message):
    with_adapter.load(base, tmp_path / "x")


def test_experts_are_refused_where_a_module_has_two_matrices():
  sizes = {**described.CONFIG, "model_type": "mixtral", "num_local_experts": 2}
  sizes |= {"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 1}
  keymap = registry.outline(sizes).keymap
  path = "model/layer_0/mlp/experts/down_proj"
  a, b = jnp.ones((2, 6, 3)), jnp.ones((2, 3, 8))
  delta = lx.LoRA(a=a, b=b, scale=jnp.ones(2), roles=("stack", "in", "out"))
  with pytest.raises(LoraxError, match=f"no layer for the LoRA of {path}: "):
    plain.of_adapter({path: delta}, keymap, "mlx-lm")

"""Files of other tools: theirs are read to their logits, ours are what they write.

written/ holds files that the tools themselves wrote, each with the tool's own logits;
the scripts beside them say how.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorax_flax as lx
from experiments.convert import convert
from lorax_flax.errors import LoraxError
from lorax_flax.hub.adapters import any as adapters
from lorax_flax.hub.adapters import mlx, plain, torchtune
from lorax_flax.hub.files import torch_file
from lorax_flax.methods import Tuned
from lorax_flax.models import gguf, registry, with_adapter
from tests.hub.adapters.written import base as described

WRITTEN = Path(__file__).parent / "written"
# What a tool's file does not say.
ALPHA = {"mlx": None, "torchtune": 3.0}
QUERY = "model/layer_1/self_attn/q_proj/kernel"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("base")
  (folder / "config.json").write_text(json.dumps(described.CONFIG))
  save_file(described.weights(), folder / "model.safetensors")
  return str(folder)


def _logits(base, source, alpha=None):
  """Logits of the last token, and the adapter."""
  loaded, saved = with_adapter.load(base, source, alpha=alpha)
  params = lx.merge(loaded.params, saved.adapter)
  ids = jnp.asarray([described.IDS])
  found = loaded.module.apply({"params": params}, ids, jnp.ones_like(ids))
  return np.asarray(found[0, -1]), saved


@pytest.fixture(scope="module", params=ALPHA)
def theirs(request, base):
  """A form, its tool's folder, our logits of that, and the tool's."""
  folder = WRITTEN / request.param
  want = np.array(json.loads((folder / "logits.json").read_text()))
  got, saved = _logits(base, folder, ALPHA[request.param])
  return request.param, folder, got, want, saved


def test_a_tools_adapter_has_its_logits(theirs, base):
  _, _, got, want, _ = theirs
  np.testing.assert_allclose(got, want, atol=1e-5)
  loaded = registry.load(base)
  ids = jnp.asarray([described.IDS])
  plain_logits = loaded.module.apply({"params": loaded.params}, ids, jnp.ones_like(ids))
  assert np.abs(plain_logits[0, -1] - want).max() > 0.1


@pytest.mark.parametrize("form", ["peft", "loralib", *adapters.PLAIN])
def test_each_form_to_each_has_equal_logits(form, theirs, base, tmp_path):
  name, folder, got, _, saved = theirs
  alpha, to = ALPHA[name], tmp_path / "x"
  if (name, form) == ("mlx", "torchtune"):
    with pytest.raises(LoraxError, match=r"unknown torchtune module 'model\.embed_tok"):
      convert(base, str(folder), str(to), form)
    return
  convert(base, str(folder), str(to), form, alpha=alpha)
  assert adapters.form(to) == form
  given = saved.config.alpha if form in ("loralib", "torchtune") else None
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


@pytest.mark.parametrize("form", ALPHA)
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

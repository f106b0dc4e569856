"""Folders for vLLM: peft reads them to the same deltas, and one rule holds for all.

vLLM itself needs a GPU. What it does with a folder is three lines, which `_as_vllm`
follows: one scale, lora_alpha / r, and each module's two factors by their keys.
"""

import copy
import dataclasses
import json
import warnings

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import lorax_flax as lx
from lorax_flax.errors import LoraxError
from lorax_flax.hub.adapters import any as adapters
from lorax_flax.hub.adapters import vllm
from lorax_flax.hub.checkpoints.entries import embedding, linear
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.methods import Tuned
from tests.hub import trees

LAYERS = 2
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CASES = {
  "one rank and alpha": {"target_modules": ["q_proj", "v_proj"]},
  "ranks and alphas": {
    "target_modules": "all-linear",
    "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.up_proj": 1},
    "alpha_pattern": {"down_proj": 3.5, r"layers\.0\.self_attn\.q_proj": 20},
  },
  "rslora": {
    "target_modules": ["q_proj", "o_proj"],
    "use_rslora": True,
    "rank_pattern": {"q_proj": 7},
  },
  "embedding": {"target_modules": ["embed_tokens", "gate_proj"], "r": 2},
}


@pytest.fixture(scope="module")
def base():
  torch.manual_seed(0)
  sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": LAYERS}
  sizes |= {"num_attention_heads": 2, "intermediate_size": 12, "head_dim": 4}
  config = transformers.LlamaConfig(**sizes, initializer_range=0.3)
  return transformers.LlamaForCausalLM(config).eval()


def _keymap(family="llama", scan=False):
  attention = [("self_attn", f"{name}_proj") for name in "qkvo"]
  mlp = [("mlp", f"{name}_proj") for name in ("gate", "up", "down")]
  rows = [embedding("embed_tokens", "embed_tokens")]
  for inside, name in attention + mlp:
    path, key = f"layer_{{i}}/{inside}/{name}", f"layers.{{i}}.{inside}.{name}"
    rows += linear(path, key, bias=False)
  rows += linear("lm_head", "lm_head", bias=False, part="head")
  anchor = "embed_tokens.weight"
  return KeyMap(family, "model.", tuple(rows), {"i": LAYERS}, scan, anchor)


def _loaded(base, folder):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def _saved(base, folder, **options):
  """A random adapter that peft wrote, as peft reads it."""
  torch.manual_seed(1)
  config = peft.LoraConfig(
    **{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options
  )
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
      for parameter in model.parameters():
        if parameter.requires_grad:
          parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
  return model.eval()


def _deltas(model):
  found = {}
  for name, module in model.named_modules():
    if isinstance(module, peft.tuners.lora.LoraLayer):
      delta = module.get_delta_weight("default").detach().numpy()
      found[name.removeprefix("base_model.model.")] = delta
  return found


def _as_vllm(folder):
  """Deltas by module, (out, in) or of an embedding (vocab, dim), as vLLM has them."""
  config = json.loads((folder / CONFIG).read_text())
  scale = config["lora_alpha"] / config["r"]
  pairs = {}
  for key, tensor in load_file(folder / WEIGHTS).items():
    parts = key.removeprefix("base_model.model.").removesuffix(".weight").split(".")
    pairs.setdefault(".".join(parts[:-1]), {})[parts[-1]] = tensor
  found = {}
  for name, pair in pairs.items():
    if "lora_A" in pair:
      assert len(pair["lora_A"]) == config["r"]
      found[name] = scale * pair["lora_B"] @ pair["lora_A"]
    else:
      assert len(pair["lora_embedding_A"]) == config["r"]
      found[name] = scale * (pair["lora_embedding_B"] @ pair["lora_embedding_A"]).T
  return found


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_folder_holds_the_same_deltas_for_peft_and_vllm(case, scan, base, tmp_path):
  source = _saved(base, tmp_path / "peft", **CASES[case])
  keymap = _keymap(scan=scan)
  saved = adapters.read(tmp_path / "peft", trees.params(base, keymap), keymap)
  vllm.write_adapter(tmp_path / "out", saved, keymap)
  want, got = _deltas(source), _deltas(_loaded(base, tmp_path / "out"))
  served = _as_vllm(tmp_path / "out")
  assert want.keys() == got.keys() == served.keys()
  for name, delta in want.items():
    assert np.abs(delta).max() > 0.05
    np.testing.assert_allclose(got[name], delta, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(served[name], delta, atol=1e-6, err_msg=name)
  config = json.loads((tmp_path / "out" / CONFIG).read_text())
  assert config["rank_pattern"] == config["alpha_pattern"] == {}
  assert not config["use_rslora"]
  ids = torch.arange(2 * 6).reshape(2, 6)
  with torch.no_grad():
    wanted = source(input_ids=ids).logits
    logits = _loaded(base, tmp_path / "out")(input_ids=ids).logits
  np.testing.assert_allclose(logits, wanted, atol=1e-5)


def test_what_needs_no_change_keeps_its_bytes(base, tmp_path):
  _saved(base, tmp_path / "peft", target_modules=["q_proj"])
  keymap = _keymap()
  saved = adapters.read(tmp_path / "peft", trees.params(base, keymap), keymap)
  vllm.write_adapter(tmp_path / "out", saved, keymap)
  want, got = (
    load_file(tmp_path / "peft" / WEIGHTS),
    load_file(tmp_path / "out" / WEIGHTS),
  )
  assert want.keys() == got.keys()
  assert all(want[key].tobytes() == got[key].tobytes() for key in want)


@pytest.fixture(scope="module")
def read(base, tmp_path_factory):
  folder = tmp_path_factory.mktemp("wide") / "peft"
  rank = {"r": 3, "rank_pattern": {"v_proj": 17}}
  _saved(base, folder, target_modules=["q_proj", "v_proj", "embed_tokens"], **rank)
  keymap = _keymap()
  return adapters.read(folder, trees.params(base, keymap), keymap)


@pytest.mark.parametrize(
  ("family", "options", "message"),
  [
    ("llama", {}, "rank 17 is above.*of 16: start it with 32 and give max_rank=32"),
    ("llama", {"max_rank": 17}, r"one of \(1, 8, 16.*not 17"),
    ("qwen2", {"max_rank": 32}, "no LoRA on the embeddings of a qwen2"),
    ("gpt2", {"max_rank": 32}, "takes no LoRA on a gpt2"),
  ],
)
def test_what_vllm_rejects_is_refused(family, options, message, read, tmp_path):
  with pytest.raises(LoraxError, match=message):
    vllm.write_adapter(tmp_path / "out", read, _keymap(family), **options)
  assert not any(tmp_path.iterdir())


def test_a_rank_that_the_server_is_told_of_is_written(base, read, tmp_path):
  vllm.write_adapter(tmp_path / "out", read, _keymap(), max_rank=32)
  assert json.loads((tmp_path / "out" / CONFIG).read_text())["r"] == 17
  assert len(_deltas(_loaded(base, tmp_path / "out"))) == 2 * LAYERS + 1


@pytest.mark.parametrize("method", ["DoRA", "BiasLoRA", "Tuned"])
def test_methods_that_vllm_lacks_are_refused_by_name(method, read, tmp_path):
  path, lora = (
    "layer_0/self_attn/q_proj/kernel",
    read.adapter["layer_0/self_attn/q_proj/kernel"],
  )
  values = {f.name: getattr(lora, f.name) for f in dataclasses.fields(lora)}
  delta = {
    "DoRA": lambda: lx.DoRA(**values, magnitude=jnp.ones(8)),
    "BiasLoRA": lambda: lx.BiasLoRA(**values, bias=jnp.ones(8)),
    "Tuned": lambda: Tuned(jnp.ones((8, 8)), jnp.ones((8, 8))),
  }[method]()
  saved = dataclasses.replace(read, adapter=read.adapter | {path: delta})
  with pytest.raises(LoraxError, match=f"rejects {method}, which {path} has"):
    vllm.write_adapter(tmp_path / "out", saved, _keymap(), max_rank=32)

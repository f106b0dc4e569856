"""Runs whose base is untied, or has other tokens than its checkpoint."""

import numpy as np
import pytest
import torch
import transformers

import lorax_flax as lx
from experiments import run
from lorax_flax.models import registry, with_adapter
from tests.experiments import peers
from tests.experiments.token_ids import rows, shrunk, write
from tests.hub.peft import peers as hub_peers

CONFIG = "llama3_8b_instruct.py"


def _base(folder, **fields):
  torch.manual_seed(0)
  sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
  heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
  config = transformers.LlamaConfig(
    vocab_size=300, max_position_embeddings=64, **sizes, **heads, **fields
  )
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


def _settings(tmp_path, **changes):
  data = write(tmp_path / "data", rows(6, 0), rows(3, 1))
  return shrunk(CONFIG, tmp_path / "base", data, **{"train.steps": 1, **changes})


def _logits(params, loaded, ids):
  mask = np.ones_like(ids)
  return loaded.module.apply({"params": params}, input_ids=ids, attention_mask=mask)


def test_a_resized_run_writes_what_peft_and_we_read(tmp_path):
  theirs = _base(tmp_path / "base")
  run.run(_settings(tmp_path, **{"model.vocab_size": 310}), tmp_path / "run")
  adapter, ids = tmp_path / "run" / "adapter", np.array([[5, 301, 309]], np.int32)
  loaded, saved = with_adapter.load(str(tmp_path / "base"), adapter)
  assert loaded.config.vocab_size == 310
  got = _logits(lx.merge(loaded.params, saved.adapter), loaded, ids)
  torch.manual_seed(9)  # PEFT puts the folder's tables over the new random rows
  theirs.resize_token_embeddings(310)
  with torch.no_grad():
    want = hub_peers.load(theirs, adapter)(torch.tensor(ids).long()).logits.numpy()
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
  "config",
  [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["lm_head"]}],
)
def test_a_run_from_an_adapter_that_trains_a_tied_table_apart_unties(config, tmp_path):
  base = _base(tmp_path / "base", tie_word_embeddings=True)
  options = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **config}
  peers.adapt(base, tmp_path / "start", **options)
  settings = _settings(
    tmp_path,
    **{
      "init_adapter": str(tmp_path / "start"),
      "lora.alpha": 6.0,
      "lora.tuned": "lm_head",
    },
  )
  run.run(settings, tmp_path / "run")
  adapter = tmp_path / "run" / "adapter"
  loaded, saved = with_adapter.load(str(tmp_path / "base"), adapter)
  assert isinstance(saved.adapter["lm_head/kernel"], lx.Tuned)
  assert registry.load(tmp_path / "base").keymap.ties
  assert not loaded.keymap.ties

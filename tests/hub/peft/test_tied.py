"""Adapters that change the uses of a tied table apart: the base is untied for them."""

import warnings

import numpy as np
import pytest
import torch

import lorax_flax as lx
from lorax_flax.hub.adapters import native
from lorax_flax.hub.checkpoints import export
from lorax_flax.hub.peft import folder as hub_peft
from lorax_flax.models import registry, with_adapter
from tests.hub.peft import peers
from tests.hub.peft.test_families import BASES, TOKENS
from tests.models import family

BOTH = ["embed_tokens", "lm_head"]
CASES = {
  "llama, both saved": ("llama tied", {"modules_to_save": BOTH}),
  "llama, head saved": ("llama tied", {"modules_to_save": ["lm_head"]}),
  "llama, both targets": ("llama tied", {"target_modules": BOTH}),
  "llama, a parameter": ("llama tied", {"target_parameters": ["embed_tokens.weight"]}),
  "llama, tokens": (
    "llama tied",
    {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [2]}},
  ),
  "gpt2, both saved": ("gpt2", {"modules_to_save": ["wte", "lm_head"]}),
  # PEFT ties by the names embed_tokens and lm_head alone.
  "gpt2, said to be tied": (
    "gpt2",
    {"target_modules": ["wte", "c_attn"], "ensure_weight_tying": True},
  ),
  "t5, head saved": ("t5", {"modules_to_save": ["lm_head"]}),
  "t5, tables saved": ("t5", {"modules_to_save": ["embed_tokens"]}),
  "t5, head a target": ("t5", {"target_modules": ["lm_head"]}),
  "t5, tables targets": ("t5", {"target_modules": ["embed_tokens", "q"]}),
  "t5, one table": ("t5", {"target_modules": ["encoder.embed_tokens", "q"]}),
  "t5 v1.1, tables saved": ("t5 v1.1", {"modules_to_save": ["embed_tokens"]}),
}
TARGETS = {"gpt2": ["c_attn"], "t5": ["q"], "t5 v1.1": ["q"]}


def _made(name, config, tmp_path):
  """The base's folder and model, and a PEFT model and its folder."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    base = BASES[name][0](tmp_path / "base")
  config = {"target_modules": TARGETS.get(name, ["q_proj"])} | config
  model = peers.adapted(base, base_model_name_or_path=str(tmp_path / "base"), **config)
  return base, model, peers.save(model, tmp_path / "theirs")


def _logits(model, inputs):
  with torch.no_grad():
    return model(**family.tensors(inputs)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_pefts_logits_come_of_an_untied_base(case, tmp_path, caplog):
  name, config = CASES[case]
  base, model, theirs = _made(name, config, tmp_path)
  inputs = BASES[name][1]
  picked = inputs.get("decoder_attention_mask", inputs["attention_mask"]) == 1
  want = _logits(model, inputs)[picked]
  assert np.abs(want - _logits(base, inputs)[picked]).max() > 0.05

  loaded, saved = with_adapter.load(str(tmp_path / "base"), theirs)
  assert "get a weight each" in caplog.text
  merged = lx.merge(loaded.params, saved.adapter)
  got = loaded.module.apply({"params": merged}, **inputs)
  np.testing.assert_allclose(got[picked], want, atol=1e-4, rtol=1e-4)

  # Back to PEFT, which reads it onto the tied base.
  hub_peft.write_adapter(
    tmp_path / "out", saved.adapter, loaded.keymap, saved.config, task_type=None
  )
  again = _logits(peers.load(base, tmp_path / "out"), inputs)
  np.testing.assert_allclose(again[picked], want, atol=1e-5)

  # By way of our own form, which remembers it.
  native.write_adapter(tmp_path / "native", saved)
  loaded, saved = with_adapter.load(str(tmp_path / "base"), tmp_path / "native")
  got = loaded.module.apply(
    {"params": lx.merge(loaded.params, saved.adapter)}, **inputs
  )
  np.testing.assert_allclose(got[picked], want, atol=1e-4, rtol=1e-4)

  # The merged checkpoint, read by transformers and here.
  export.write_checkpoint(
    tmp_path / "merged",
    merged,
    loaded.keymap,
    loaded.hf_config,
    architecture=loaded.family.architecture,
    labels=None,
    base=tmp_path / "base",
    overwrite=False,
  )
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    back = type(base).from_pretrained(tmp_path / "merged").eval()
  np.testing.assert_allclose(_logits(back, inputs)[picked], want, atol=1e-4)
  ours = registry.load(tmp_path / "merged")
  got = ours.module.apply({"params": ours.params}, **inputs)
  np.testing.assert_allclose(got[picked], want, atol=1e-4, rtol=1e-4)


def test_two_copies_that_are_equal_need_no_untied_base(tmp_path, caplog):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    base = BASES["llama tied"][0](tmp_path / "base")
    model = peers.peft.get_peft_model(
      base, peers.peft.LoraConfig(target_modules=["q_proj"], modules_to_save=BOTH)
    )
  theirs = peers.save(model, tmp_path / "theirs")
  loaded, _ = with_adapter.load(str(tmp_path / "base"), theirs)
  assert "lm_head/kernel" not in loaded.keymap.keys
  assert not caplog.text


@pytest.mark.parametrize(
  ("name", "config", "message"),
  [
    ("t5", {"target_modules": ["shared"]}, "shared alone.*does not use it.*encoder"),
    ("t5", {"modules_to_save": ["shared", "lm_head"]}, "shared alone"),
    ("t5 v1.1", {"trainable_token_indices": TOKENS}, "depends on the version"),
    ("t5 v1.1", {"trainable_token_indices": {"shared": TOKENS}}, "depends on the ver"),
  ],
)
def test_what_peft_itself_leaves_without_effect_or_meaning_is_refused(
  name, config, message, tmp_path
):
  _, _, theirs = _made(name, config, tmp_path)
  with pytest.raises(lx.LoraxError, match=message):
    with_adapter.load(str(tmp_path / "base"), theirs)


@pytest.mark.parametrize(
  ("name", "config", "message"),
  [
    ("distilbert", {"task_type": "TOKEN_CLS"}, "TOKEN_CLS.*distilbert here is one for"),
    ("distilbert", {"task_type": "QUESTION_ANS"}, "QUESTION_ANS"),
    ("distilbert", {"task_type": "CAUSAL_LM"}, "CAUSAL_LM"),
    ("llama", {"task_type": "SEQ_CLS"}, "SEQ_CLS.*CAUSAL_LM"),
    ("llama", {"auto_mapping": "LlamaForTokenClassification"}, "TOKEN_CLS"),
    ("distilbert", {"auto_mapping": "DistilBertForMaskedLM"}, "MASKED_LM"),
  ],
)
def test_a_task_that_the_family_has_no_model_for_is_refused(
  name, config, message, tmp_path
):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    BASES[name][0](tmp_path / "base")
  keymap = registry.outline(registry.read_config(tmp_path / "base")).keymap
  if told := config.pop("auto_mapping", None):
    config["auto_mapping"] = {"base_model_class": told, "parent_library": "x"}
  raw = {"peft_type": "LORA", "target_modules": ["q_lin", "q_proj"], **config}
  with pytest.raises(lx.LoraxError, match=message):
    hub_peft.from_peft(raw, keymap)
  with pytest.raises(lx.LoraxError, match=config.get("task_type", "it has no file")):
    hub_peft.write_adapter(
      tmp_path / "out",
      {},
      keymap,
      lx.LoraConfig(),
      task_type=config.get("task_type", "it has no file"),
    )

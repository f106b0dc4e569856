"""Adapters that PEFT wrote after resize_token_embeddings: it adds the base's tables."""

import copy
import warnings

import numpy as np
import pytest
import torch

import lorax_flax as lx
from lorax_flax.hub.peft import folder as hub_peft
from lorax_flax.models import registry, with_adapter
from tests.hub.peft import peers
from tests.hub.peft.test_families import BASES
from tests.models import family

OLD, NEW = 37, 40
BOTH = ["embed_tokens", "lm_head"]
CASES = {
  "both saved": ("llama", {"modules_to_save": BOTH}),
  "tokens": ("llama", {"trainable_token_indices": [37, 38, 5]}),
  "tied, tokens": ("llama tied", {"trainable_token_indices": [37, 38, 5]}),
  "tied, saved": (
    "llama tied",
    {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
  ),
  "tied, saved apart": ("llama tied", {"modules_to_save": BOTH}),
  "targets": ("llama", {"target_modules": ["q_proj", *BOTH]}),
  "neither trained": ("llama", {}),
  "tied, neither trained": ("llama tied", {}),
}
INPUTS = {
  "input_ids": np.array([[5, 37, 9, 39], [38, 5, 3, 1]], np.int32),
  "attention_mask": np.ones((2, 4), np.int32),
}


def _logits(model):
  with torch.no_grad():
    return model(**family.tensors(INPUTS)).logits.numpy()


def _made(case, tmp_path):
  """The resized torch model, and PEFT's model and folder."""
  name, config = CASES[case]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    made = BASES[name][0](tmp_path / "base")
    # PEFT takes the base's name from the model, and looks at its config.json.
    model = type(made).from_pretrained(tmp_path / "base").eval()
    torch.manual_seed(2)
    model.resize_token_embeddings(NEW)
  model.save_pretrained(tmp_path / "grown")
  config = {"target_modules": ["q_proj"], **config}
  adapted = peers.adapted(model, task_type="CAUSAL_LM", **config)
  return model, adapted, peers.save(adapted, tmp_path / "theirs")


@pytest.mark.parametrize("base", ["base", "grown"])
@pytest.mark.parametrize("case", CASES)
def test_pefts_logits_come_of_the_base_resized_or_not(case, base, tmp_path, caplog):
  model, adapted, theirs = _made(case, tmp_path)
  want = _logits(adapted)
  loaded, saved = with_adapter.load(str(tmp_path / base), theirs)
  assert ("37 tokens is made 40" in caplog.text) == (base == "base")
  merged = lx.merge(loaded.params, saved.adapter)
  got = loaded.module.apply({"params": merged}, **INPUTS)
  np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)
  assert loaded.hf_config["vocab_size"] == NEW

  hub_peft.write_adapter(
    tmp_path / "out",
    saved.adapter,
    loaded.keymap,
    saved.config,
    params=loaded.params,
    task_type="CAUSAL_LM",
    dtypes=hub_peft.stored_dtypes(theirs),
  )
  peers.same_tensors(tmp_path / "out", theirs)
  assert np.abs(_logits(peers.load(model, tmp_path / "out")) - want).max() < 1e-5


def test_tables_that_are_not_the_bases_are_taken_and_named(tmp_path, caplog):
  # As PEFT does: what a base was resized to is random.
  _, adapted, theirs = _made("tokens", tmp_path)
  other = registry.load(tmp_path / "base", vocab_size=NEW)
  with pytest.raises(lx.LoraxError, match="whose vocabulary was changed"):
    hub_peft.read_adapter(theirs, other.params, other.keymap)
  tables = hub_peft.with_tables(theirs, other.params, other.keymap)
  assert "brings a lm_head/kernel that is not the base's" in caplog.text
  adapter, _ = hub_peft.read_adapter(theirs, tables, other.keymap)
  got = other.module.apply({"params": lx.merge(tables, adapter)}, **INPUTS)
  np.testing.assert_allclose(got, _logits(adapted), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama tied", "t5", "distilbert"])
def test_a_base_grows_by_the_mean_of_its_rows_and_shrinks(name, scan, tmp_path):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = copy.deepcopy(BASES[name][0](tmp_path / "base"))
    theirs.resize_token_embeddings(NEW)
  inputs = dict(BASES[name][1])
  inputs["input_ids"] = np.where(inputs["input_ids"] == 5, OLD, inputs["input_ids"])
  loaded = registry.load(tmp_path / "base", vocab_size=NEW, scan=scan)
  got = loaded.module.apply({"params": loaded.params}, **inputs)
  with torch.no_grad():
    want = theirs(**family.tensors(inputs)).logits.numpy()
  seen = ... if got.ndim == 2 else np.ones(got.shape[:2], bool)
  if got.ndim == 3:
    seen = inputs.get("decoder_attention_mask", inputs["attention_mask"]) == 1
  # transformers adds noise of variance 1e-9 times the rows'.
  np.testing.assert_allclose(got[seen], want[seen], atol=5e-3, rtol=1e-3)
  small = registry.load(tmp_path / "base", vocab_size=30, scan=scan)
  got = small.module.apply(
    {"params": small.params}, **{n: np.minimum(x, 29) for n, x in inputs.items()}
  )
  assert np.isfinite(got).all()


def test_messages_speak_of_the_vocabulary(tmp_path):
  _, _, theirs = _made("both saved", tmp_path)
  loaded = registry.load(tmp_path / "base")
  with pytest.raises(lx.LoraxError, match=r"vocabulary was resized.*vocab_size"):
    hub_peft.read_adapter(theirs, loaded.params, loaded.keymap)
  _, _, theirs = _made("tokens", tmp_path)
  with pytest.raises(lx.LoraxError, match=r"vocabulary was resized.*vocab_size"):
    hub_peft.read_adapter(theirs, loaded.params, loaded.keymap)
  config = (tmp_path / "base" / "config.json").read_text()
  (tmp_path / "base" / "config.json").write_text(config.replace(": 37", ": 36"))
  with pytest.raises(lx.LoraxError, match="vocabulary"):
    registry.load(tmp_path / "base")

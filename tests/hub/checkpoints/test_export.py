"""Checkpoints that we write, loaded by transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lorax_flax.hub.checkpoints import export
from lorax_flax.models import registry
from tests.models import peers


def rewrite(source, folder, labels, **options):
  """Loads a folder and writes it again."""
  loaded = registry.load(source, **options)
  export.write_checkpoint(
    folder,
    loaded.params,
    loaded.keymap,
    loaded.hf_config,
    architecture=loaded.family.architecture,
    labels=labels,
    base=source,
    overwrite=False,
  )
  return loaded


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_checkpoint_comes_back_as_it_was_read(tmp_path, family, scan):
  model = peers.save(tmp_path / "base", family, num_labels=3)
  rewrite(tmp_path / "base", tmp_path / "out", ["no", "maybe", "yes"], scan=scan)
  again = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / "out"
  )
  assert type(again) is type(model)
  assert again.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
  want, got = model.state_dict(), again.state_dict()
  assert want.keys() == got.keys()
  assert all(torch.equal(want[key], got[key]) for key in want)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_weights_load_in_the_dtype_they_are_written_in(tmp_path, field):
  model = peers.save(tmp_path / "base")
  model.half().save_pretrained(tmp_path / "base")
  path = tmp_path / "base" / "config.json"
  config = json.loads(path.read_text())
  config[field] = config.pop("dtype")
  path.write_text(json.dumps(config))
  loaded = rewrite(
    tmp_path / "base", tmp_path / "out", ["no", "yes"], param_dtype="float32"
  )
  again = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / "out"
  ).eval()
  assert again.dtype == torch.float32
  inputs = peers.batch()
  got = loaded.module.apply({"params": loaded.params}, *inputs.values())
  np.testing.assert_allclose(np.asarray(got), peers.logits(again, inputs), atol=1e-5)


def test_bfloat16_weights_are_written_as_they_are(tmp_path):
  peers.save(tmp_path / "base")
  loaded = rewrite(
    tmp_path / "base", tmp_path / "out", ["no", "yes"], param_dtype="bfloat16"
  )
  again = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / "out"
  )
  assert again.dtype == torch.bfloat16
  want = loaded.params["classifier"]["kernel"].astype(jnp.float32).T
  got = again.classifier.weight.detach().float().numpy()
  np.testing.assert_array_equal(got, np.asarray(want))


def test_one_output_is_written_as_a_regression(tmp_path):
  peers.save(tmp_path / "base", num_labels=1)
  rewrite(tmp_path / "base", tmp_path / "out", ["score"])
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["problem_type"] == "regression"
  assert config["id2label"] == {"0": "score"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_keep_the_dtype_that_they_are_stored_in(tmp_path, dtype):
  model = peers.save(tmp_path / "base").to(getattr(torch, dtype))
  model.save_pretrained(tmp_path / "base")
  loaded = rewrite(tmp_path / "base", tmp_path / "out", ["no", "yes"])
  assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {jnp.dtype(dtype)}
  again = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / "out"
  )
  want, got = model.state_dict(), again.state_dict()
  assert all(torch.equal(want[key], got[key]) for key in want)
  inputs = peers.batch()
  logits = loaded.module.apply({"params": loaded.params}, **inputs)
  want = peers.logits(model.float(), inputs)
  np.testing.assert_allclose(np.asarray(logits), want, atol=1e-4)

"""Runs whose adapter starts with what the first batches of the data say."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lorax_flax as lx
from experiments import run
from lorax_flax.models import with_adapter
from tests.experiments import peers
from tests.experiments.token_ids import rows, shrunk, write

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("starts")
  peers.tiny("llama", folder / "base")
  write(folder / "data", rows(22, 0), rows(9, 1))
  return folder


def settings(files, **changes):
  own = {"lora.targets": "q_proj,down_proj", "lora.rank": 3, "train.steps": 1}
  return shrunk(
    "llama3_8b_instruct.py", files / "base", files / "data", **(own | changes)
  )


def test_a_run_starts_with_eva_and_writes_the_ranks_that_it_gave(files, tmp_path):
  result = run.run(settings(files, **{"lora.init": "eva"}), tmp_path / "run")
  assert np.isfinite(result["eval_loss"])
  _, saved = with_adapter.load(str(files / "base"), tmp_path / "run" / "adapter")
  assert saved.config.init == "eva"
  ranks = {
    path: [np.linalg.matrix_rank(a) for a in delta.a.reshape(-1, *delta.a.shape[-2:])]
    for path, delta in saved.adapter.items()
  }
  assert sum(sum(each) for each in ranks.values()) == 3 * 4
  assert len({rank for each in ranks.values() for rank in each}) > 1


@pytest.mark.parametrize("method", ["corda", "lora_ga"])
def test_a_run_starts_with_a_method_that_looks_at_data(method, files, tmp_path):
  job = run.prepare({tmp_path / "run": settings(files, **{"lora.method": method})})
  for delta in job.runs[0].adapter.values():
    assert np.abs(delta.a).max() > 0
    assert np.abs(delta.b).max() > 0
    np.testing.assert_array_equal(delta.start_b, delta.b)


@pytest.mark.parametrize("method", ["pissa", "olora", "corda", "lora_ga"])
def test_a_run_with_a_start_inside_the_kernels_writes_lora_of_twice_the_rank(
  method, files, tmp_path
):
  changes = {"lora.method": method, "lora.alpha": 3}
  result = run.run(settings(files, **changes), tmp_path / "run")
  folder = tmp_path / "run" / "adapter"
  config = json.loads((folder / "adapter_config.json").read_text())
  assert (config["peft_type"], config["r"]) == ("LORA", 6)
  base = AutoModelForCausalLM.from_pretrained(files / "base")
  ids = torch.arange(3, 20)[None]
  before = base(ids).logits
  logits = PeftModel.from_pretrained(base, folder)(ids).logits
  assert (logits - before).abs().max() > 1e-3
  loaded, saved = with_adapter.load(str(files / "base"), folder)
  model = lambda params, ids: loaded.module.apply(
    {"params": params}, ids, jnp.ones_like(ids)
  )
  ours = lx.adapt(model, saved.config).apply(loaded.params, saved.adapter, ids.numpy())
  np.testing.assert_allclose(ours, logits.detach(), rtol=1e-4, atol=1e-5)
  assert np.isfinite(result["eval_loss"])

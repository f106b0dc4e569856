"""Runs with trained states beside the weights, alone and with LoRA."""

import json

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy

import lorax_flax as lx
from experiments import convert, generate, merge, predict, run
from experiments.inference import merged, writers
from lorax_flax.errors import LoraxError
from lorax_flax.models import with_adapter
from lorax_flax.serve.conversation import Conversation
from lorax_flax.serve.settings import Decoding
from tests.experiments import peers
from tests.experiments.token_ids import rows, shrunk, write
from tests.train.stopping import interrupt

pytestmark = [
  pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("soft")
  peers.tiny("llama", folder / "base")
  write(folder / "data", rows(22, 0), rows(9, 1))
  prompts = [{"input_ids": [3, 6, 9]}, {"input_ids": [4]}]
  text = "".join(json.dumps(line) + "\n" for line in prompts)
  (folder / "in.jsonl").write_text(text)
  return folder


def settings(files, **changes):
  both = {"soft.method": "prefix", "soft.length": 3, "lora.targets": "q_proj,v_proj"}
  return shrunk(
    "llama3_8b_instruct.py", files / "base", files / "data", **(both | changes)
  )


def lines(workdir):
  return [*map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())]


@pytest.fixture(scope="module")
def both(files):
  """A run of LoRA and a prefix in one."""
  return run.run(settings(files), files / "both"), files / "both"


def test_lora_and_a_prefix_train_in_one_run(files, both):
  result, workdir = both
  loaded, saved = with_adapter.load(str(files / "base"), workdir / "adapter")
  kinds = {path.split("/")[-2]: type(d).__name__ for path, d in saved.adapter.items()}
  assert kinds == {"prefix": "Tuned", "q_proj": "LoRA", "v_proj": "LoRA"}
  count = sum(
    d.leaves()[name].size for d in saved.adapter.values() for name in d.trained
  )
  assert result["trained_parameters"] == count
  # Both learnt, and the run's last evaluation is what the folder computes.
  states = saved.adapter["prefix/states"]
  start = loaded.reseeded(0).params["prefix"]["states"]
  assert np.abs(states.value - start).max() > 1e-3
  assert all(np.asarray(d.b).any() for d in saved.adapter.values() if hasattr(d, "b"))
  found = [line["train/loss"] for line in lines(workdir) if "train/loss" in line]
  assert found[-1] < found[0]


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(files, both, tmp_path):
  result, workdir = both
  interrupt(settings(files), tmp_path, after=5)
  again = run.run(settings(files), tmp_path)
  assert again["last"] == result["last"]
  mine, other = (
    with_adapter.load(str(files / "base"), folder / "adapter")[1].adapter
    for folder in (tmp_path, workdir)
  )
  jax.tree.map(np.testing.assert_array_equal, mine, other)


def test_the_commands_apply_both(files, both, tmp_path):
  _, workdir = both
  base, adapter = str(files / "base"), str(workdir / "adapter")
  source, out = str(files / "in.jsonl"), tmp_path / "out.jsonl"
  predict.predict(base, adapter, source, str(out))
  found = [json.loads(line)["logits"] for line in out.read_text().splitlines()]
  model = merged.load(base, adapter)
  ids = np.array([[3, 6, 9]], np.int32)
  expected = model.loaded.module.apply(
    {"params": model.loaded.params}, ids, np.ones_like(ids)
  )
  np.testing.assert_allclose(found[0], expected[0, -1], atol=1e-4)
  without = {**model.loaded.params}
  without["prefix"] = {"states": 0 * without["prefix"]["states"]}
  other = model.loaded.module.apply({"params": without}, ids, np.ones_like(ids))
  assert np.abs(np.asarray(other[0, -1]) - found[0]).max() > 1e-2
  generate.generate(
    base, adapter, source, str(tmp_path / "texts"), Decoding(max_new_tokens=4)
  )
  text = (tmp_path / "texts").read_text().splitlines()[0]
  first = json.loads(text)["output_ids"][0]
  assert first == int(np.argmax(found[0]))


def test_a_conversation_goes_on_after_the_prefix(files, both):
  writer, _ = writers.load(str(files / "base"), str(both[1] / "adapter"))
  decoding, talk = Decoding(max_new_tokens=3), Conversation(writer)
  "".join(talk.answer([3, 6, 9], decoding))
  # Further tokens, a step back, and another beginning.
  for prompt in ([3, 6, 9, 4, 5, 7], [3, 6], [5]):
    alone = "".join(Conversation(writer).answer(prompt, decoding))
    assert "".join(talk.answer(prompt, decoding)) == alone


def test_what_has_no_place_elsewhere_is_refused_by_name(files, both, tmp_path):
  base, adapter = str(files / "base"), str(both[1] / "adapter")
  for form in ("transformers", "stablehlo"):
    with pytest.raises(LoraxError, match="no place for prefix/states"):
      merge.merge(base, adapter, str(tmp_path / "merged"), form)
  for form, message in (
    ("peft", "PREFIX_TUNING and other deltas in one"),
    ("vllm", "prefix/states"),
    ("gguf", "prefix/states"),
    ("loralib", "prefix/states"),
  ):
    with pytest.raises(LoraxError, match=message):
      convert.convert(base, adapter, str(tmp_path / form), form)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_a_part_alone_is_written_as_peft_has_it(files, method, tmp_path):
  alone = settings(files, **{"soft.method": method, "lora.targets": ()})
  run.run(alone, tmp_path / "run")
  written = tmp_path / "run" / "adapter"
  config = peft.PeftConfig.from_pretrained(written)
  assert config.peft_type.value == f"{method.upper()}_TUNING"
  tensors = safetensors.numpy.load_file(written / "adapter_model.safetensors")
  assert tensors.keys() == {"prompt_embeddings"}
  # To our form, and back to PEFT's.
  base = str(files / "base")
  convert.convert(base, str(written), str(tmp_path / "ours"))
  convert.convert(base, str(tmp_path / "ours"), str(tmp_path / "theirs"), "peft")
  again = safetensors.numpy.load_file(tmp_path / "theirs/adapter_model.safetensors")
  np.testing.assert_array_equal(
    again["prompt_embeddings"], tensors["prompt_embeddings"]
  )
  # A further run starts from it.
  more = {"soft.method": method, "lora.targets": (), "init_adapter": str(written)}
  result = run.run(settings(files, **more), tmp_path / "more")
  assert result["last"]
  first, last = (lines(tmp_path / name)[at] for name, at in (("more", 0), ("run", 0)))
  assert first["train/loss"] < last["train/loss"]


def test_a_type_of_peft_that_is_not_built_is_named(tmp_path, files):
  model = peers.tiny("llama", tmp_path / "base")
  config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
  peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
  with pytest.raises(lx.LoraxError, match="P_TUNING"):
    with_adapter.load(str(files / "base"), tmp_path / "adapter")

"""The task e2e: what is read, and what is learnt, as the LoRA paper's code has it."""

import numpy as np
import pytest

from lorax_flax.data.sequences import IGNORED
from lorax_flax.errors import LoraxError
from lorax_flax.models import registry
from lorax_flax.tasks import e2e
from tests.data import test_e2e as data
from tests.experiments import own_text


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("base")
  tokenizer = own_text.decoder(folder)
  return registry.load(folder), tokenizer


def _settings(folder, **changes):
  return e2e.E2ESettings("e2e", path=str(data.write(folder)), **changes)


def test_prompt_separator_and_reference_are_tokenised_apart(base, tmp_path):
  model, tokenizer = base
  splits = e2e.TASK.read(_settings(tmp_path, max_length=200), model)
  assert (len(splits.train), len(splits.evaluation["validation"])) == (3, 3)
  batch = splits.train.batch(np.array([0]), 200)
  encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
  prompt = encode("name : Blue Spice | Type : coffee shop | area : city centre")
  reference = encode(" Blue Spice is it .")
  begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
  ids = [begin, *prompt, begin, *reference, end]
  found = batch["input_ids"][0]
  assert found[batch["attention_mask"][0] == 1].tolist() == ids
  labels = batch["labels"][0][: len(ids)]
  assert labels.tolist() == [IGNORED] * (len(prompt) + 2) + [*reference, end]
  assert batch["weights"][0] == len(reference) + 1


def test_rows_are_as_many_as_requested(base, tmp_path):
  settings = _settings(tmp_path, max_length=200, train_rows=2, eval_rows=1)
  splits = e2e.TASK.read(settings, base[0])
  assert (len(splits.train), len(splits.evaluation["validation"])) == (2, 1)
  with pytest.raises(LoraxError, match=r"data\.eval_rows must be at least 1, not 0"):
    _settings(tmp_path, eval_rows=0)

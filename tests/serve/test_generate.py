"""Batches of unequal prompts through the cache: transformers' texts, and streams."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers

import lorax_flax as lx
from lorax_flax.adapt import paths
from lorax_flax.errors import LoraxError
from lorax_flax.methods import Tuned
from lorax_flax.models import registry
from lorax_flax.serve import conversation, ends
from lorax_flax.serve import generate as generation
from lorax_flax.serve.settings import Decoding
from tests.serve import talker as talkers
from tests.serve.conftest import CONFIGS, VOCAB, save

RNG = np.random.default_rng(0)
PAD, NEW = 39, 10
PROMPTS = [RNG.integers(3, PAD, n).tolist() for n in (5, 18, 1, 7, 2)]


@pytest.fixture(scope="module", params=CONFIGS)
def both(request, tmp_path_factory):
  """A model of transformers that ends its texts early, and its folder."""
  folder = tmp_path_factory.mktemp("model")
  model = save(request.param, folder)
  model.generation_config.eos_token_id = None
  ids = np.concatenate(_peer(model, Decoding(max_new_tokens=NEW)))
  ends = np.argsort(-np.bincount(ids, minlength=VOCAB))[1:3].tolist()
  model.generation_config.eos_token_id = ends
  own = {"eos_token_id": ends, "decoder_start_token_id": 0, "temperature": 3.0}
  (folder / "generation_config.json").write_text(json.dumps(own))
  return model, folder


def _peer(model, decoding):
  """Each prompt alone, which pads nothing."""
  found = []
  for prompt in PROMPTS:
    with torch.no_grad():
      ids = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=int),
        do_sample=False,
        max_new_tokens=NEW,
        num_beams=decoding.beams,
        length_penalty=decoding.length_penalty,
        no_repeat_ngram_size=decoding.no_repeat_ngram,
        repetition_penalty=decoding.repetition_penalty,
        pad_token_id=PAD,
      )[0]
    start = 1 if model.config.is_encoder_decoder else len(prompt)
    found.append(ids[start:].tolist())
  return found


def _ours(writer, decoding, **options):
  found = dict(generation.generate(writer, PROMPTS, decoding, **options))
  return [list(found[number].ids) for number in range(len(PROMPTS))]


@pytest.mark.parametrize(
  "fields",
  [
    {"repetition_penalty": 1.4, "no_repeat_ngram": 2},
    {"beams": 2, "length_penalty": 2.0, "no_repeat_ngram": 2},
  ],
  ids=str,
)
def test_texts_of_unequal_prompts_are_transformers(both, fields):
  model, folder = both
  decoding = Decoding(max_new_tokens=NEW, **fields)
  writer = generation.writer(registry.load(folder))
  # The second batch is filled up.
  ours = _ours(writer, decoding, batch_size=3)
  assert ours == _peer(model, decoding)
  assert {len(ids) for ids in ours} != {NEW}


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
  """A llama with a tokenizer."""
  return talkers.make(tmp_path_factory.mktemp("talker"))


def test_a_stream_is_the_text_and_a_stop_string_ends_both(talker):
  decoding = Decoding(max_new_tokens=30, temperature=1.0, seed=3)
  prompt = PROMPTS[0]
  ((_, full),) = generation.generate(talker, [prompt], decoding)
  assert len(full.ids) == 30
  assert full.text == talker.tokenizer.decode(full.ids)
  pieces = list(conversation.stream(talker, prompt, decoding))
  assert len(pieces) > 10
  assert "".join(pieces) == full.text

  texts = (full.text[i : i + 3] for i in range(9, 40))
  stop = next(text for text in texts if text.isascii())
  end = full.text.index(stop)
  stopping = Decoding(max_new_tokens=30, temperature=1.0, seed=3, stop=(stop,))
  ((_, short),) = generation.generate(talker, [prompt], stopping)
  assert (
    short.text
    == full.text[:end]
    == "".join(conversation.stream(talker, prompt, stopping))
  )
  assert short.ids == full.ids[: len(short.ids)]
  # The ids reach over the string's end, and no further.
  assert stop in talker.tokenizer.decode(short.ids)
  assert stop not in talker.tokenizer.decode(short.ids[:-1])


def test_a_special_token_as_stop_string_ends_a_text(talker):
  added = talker.tokenizer.backend.get_added_tokens_decoder()
  ((number, token),) = added.items()
  found = ends.special_stops((token.content, "a"), talker.tokenizer)
  assert found == (number,)
  with pytest.raises(LoraxError, match=r"holds the special token .*give the token"):
    ends.special_stops((f"{token.content}.",), talker.tokenizer)


def test_an_unmerged_adapter_writes_what_the_merged_one_does(tmp_path):
  save("llama", tmp_path)
  loaded = registry.load(tmp_path)
  kernels = paths.flatten(loaded.params)
  path = next(name for name in kernels if name.endswith("down_proj/kernel"))
  kernel = kernels[path]
  value = kernel + 0.3 * jax.random.normal(jax.random.key(0), kernel.shape)
  adapter = {path: Tuned(value, kernel)}
  params = lx.merge(loaded.params, adapter)
  merged = generation.writer(dataclasses.replace(loaded, params=params))
  beside = generation.writer(loaded, adapter)
  decoding = Decoding(max_new_tokens=4)
  assert _ours(beside, decoding) == _ours(merged, decoding)
  assert _ours(merged, decoding) != _ours(generation.writer(loaded), decoding)


def test_what_has_no_room_is_named(both):
  _, folder = both
  writer = generation.writer(registry.load(folder))
  few = Decoding(max_new_tokens=4)
  with pytest.raises(LoraxError, match="example 2 has no tokens"):
    next(generation.generate(writer, [[5], []], few))
  long = [[5], [6] * 3000]
  with pytest.raises(LoraxError, match=r"example 2 has 3000 tokens.*the model takes"):
    next(generation.generate(writer, long, few))


def test_a_model_without_a_next_token_is_refused(tmp_path):
  config = transformers.BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=16,
  )
  transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
  with pytest.raises(LoraxError, match="a bert doesn't generate"):
    generation.writer(registry.load(tmp_path))

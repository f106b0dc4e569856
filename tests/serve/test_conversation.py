"""A text in turns: what it is alone, whatever the cache held before."""

import dataclasses
import itertools
import json

import pytest

from lorax_flax.models import registry
from lorax_flax.serve import conversation
from lorax_flax.serve import generate as generation
from lorax_flax.serve.conversation import Conversation
from lorax_flax.serve.decoder import Decoder
from lorax_flax.serve.settings import Decoding
from tests.serve import talker
from tests.serve.conftest import save
from tests.serve.test_generate import PROMPTS

WINDOW, MOST = 19, 512
NEW = Decoding(max_new_tokens=6, repetition_penalty=1.2)
MODELS = {
  "llama": {},
  "windowed": {"model_type": "mistral", "sliding_window": WINDOW},
}


@pytest.fixture(scope="module", params=MODELS)
def writer(request, tmp_path_factory):
  """A writer, and the number of tokens of each of its prefills."""
  folder = tmp_path_factory.mktemp(request.param)
  save("llama", folder, vocab_size=600, eos_token_id=None, max_position_embeddings=MOST)
  tokenizer = talker.tokenizer(folder)
  config = json.loads((folder / "config.json").read_text())
  config |= {**MODELS[request.param], "architectures": []}
  (folder / "config.json").write_text(json.dumps(config))
  made = generation.writer(registry.load(folder), tokenizer=tokenizer)
  read = []

  def prefill(params, inputs, cache):
    read.append(int(inputs["attention_mask"].sum()))
    return made.decoder.prefill(params, inputs, cache)

  counted = Decoder(prefill, made.decoder.step)
  return dataclasses.replace(made, decoder=counted), read


def _alone(writer, prompt, decoding=NEW):
  ((_, found),) = generation.generate(writer, [prompt], decoding)
  return found


def test_a_turn_reads_what_is_new_and_writes_what_the_full_text_gives(writer):
  writer, read = writer
  talk, text = Conversation(writer), []
  # The third turn needs a longer cache, and is longer than the window.
  for turn, size in zip((PROMPTS[0], PROMPTS[3], PROMPTS[1]), (5, 8, 19), strict=True):
    text = text + turn
    alone = _alone(writer, text)
    del read[:]
    assert "".join(talk.answer(text, NEW)) == alone.text
    # The last token of an answer is read with what follows it.
    assert read == [size]
    text = text + list(alone.ids)
    assert talk.tokens == len(text)


def test_an_answer_that_was_ended_or_changed_leaves_no_trace(writer):
  writer, read = writer
  prompt, rest = PROMPTS[1], PROMPTS[4]
  full = _alone(writer, prompt)
  talk = Conversation(writer)
  said = talk.answer(prompt, NEW)
  assert "".join(itertools.islice(said, 2)) in full.text
  said.close()
  del read[:]
  shorter = prompt + list(full.ids[:1]) + rest
  expected = _alone(writer, shorter)
  del read[:]
  assert "".join(talk.answer(shorter, NEW)) == expected.text
  # A ring that is full has overwritten what the earlier tokens attend to.
  ring = writer.model.config.windows[0] is not None
  assert read == [len(shorter) if ring else len(rest)]
  # Another text from its start, and the same text again.
  for prompt in (PROMPTS[0], PROMPTS[0]):
    assert "".join(talk.answer(prompt, NEW)) == _alone(writer, prompt).text


def test_an_error_on_the_way_forgets_the_cache(writer):
  writer, _ = writer
  broken = dataclasses.replace(
    writer, decoder=writer.decoder._replace(step=_fails_later())
  )
  talk = Conversation(broken)
  with pytest.raises(ZeroDivisionError):
    list(talk.answer(PROMPTS[0], NEW))
  assert talk.tokens == 0


def _fails_later():
  def step(params, ids_B, cache):
    raise ZeroDivisionError

  return step


def test_a_stream_has_no_empty_piece(writer):
  writer, _ = writer
  pieces = list(conversation.stream(writer, PROMPTS[0], NEW))
  assert all(pieces)
  assert "".join(pieces) == _alone(writer, PROMPTS[0]).text

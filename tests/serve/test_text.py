"""Streams of text: `decode` of all tokens, and never a piece that changes later."""

import itertools
import json

import numpy as np
import pytest

from lorax_flax.data.tokenize import load_tokenizer
from lorax_flax.serve.text import StopStrings, TextStream
from tests.data.test_tokenizers import FAMILIES, TEXTS

# Each way to write a text: bytes, "▁" with bytes to fall back on, "▁" alone, and "##".
KINDS = ("gpt2", "qwen2", "llama", "gemma", "t5", "bert", "deberta")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  model_type, class_name, write = FAMILIES[request.param]
  write(folder)
  (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
  config = {"tokenizer_class": class_name}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return load_tokenizer(folder)


def _rows(tokenizer):
  """Ids of texts, and random ones: broken characters, special and unknown ids."""
  rng = np.random.default_rng(0)
  yield from (tokenizer.encode(text).ids for text in TEXTS)
  size = tokenizer.backend.get_vocab_size()
  for length in (1, 2, 3, 5, 40, 150):
    yield from rng.integers(0, size + 3, (30, length)).tolist()
  # Few tokens, so that bytes meet bytes.
  for _ in range(60):
    few = rng.integers(0, size, 6)
    yield rng.choice(few, 50).tolist()
  emoji = tokenizer.encode("🙂 emoji 👩‍👩‍👧", add_special_tokens=False).ids
  for _ in range(60):
    yield rng.choice(emoji, 50).tolist()
  yield emoji * 20


def test_the_pieces_are_the_text_of_all_tokens(tokenizer):
  for ids in _rows(tokenizer):
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    rest = stream.finish()
    assert "".join(pieces) + rest == tokenizer.decode(ids), ids


def test_a_piece_comes_once_it_is_certain_and_no_later(tokenizer):
  words = tokenizer.encode("the cat the cat the cat", add_special_tokens=False).ids
  stream = TextStream(tokenizer)
  for count, token in enumerate(words, 1):
    stream.push(token)
    assert stream._tokens._given == len(tokenizer.decode(words[:count]))


def test_half_a_character_is_held_back(tokenizer):
  ids = tokenizer.encode("the 🙂 cat", add_special_tokens=False).ids
  if "🙂" not in tokenizer.decode(ids):
    pytest.skip("this vocabulary has not the character")
  stream = TextStream(tokenizer)
  pieces = [stream.push(token) for token in ids]
  assert not any("\ufffd" in piece for piece in pieces)
  assert "🙂" in "".join(pieces)


@pytest.mark.parametrize("stop", [("cat s",), ("xyz", "at"), ("e c", "cat")])
def test_text_ends_before_a_stop_string_that_crosses_tokens(tokenizer, stop):
  ids = tokenizer.encode("the cat sees the cat").ids
  stream = TextStream(tokenizer, stop)
  found = ""
  for token in ids:
    found += stream.push(token)
    if stream.stopped:
      break
  found += stream.finish()
  text = tokenizer.decode(ids)
  assert stream.stopped
  assert found == text[: min(text.find(s) for s in stop if s in text)]


def test_stop_strings_are_found_wherever_the_pieces_are_cut():
  rng = np.random.default_rng(0)
  for _ in range(3000):
    text = "".join(rng.choice(list("ab"), 12))
    stops = ["".join(rng.choice(list("ab"), n)) for n in rng.integers(1, 6, 2)]
    cuts = [0, *sorted(rng.integers(0, 13, 4)), 12]
    finder, given = StopStrings(stops), ""
    for start, end in itertools.pairwise(cuts):
      given += finder.push(text[start:end])
      assert not any(s in given for s in stops)
    given += finder.finish()
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    assert finder.found == bool(ends)
    assert given == (text[: min(ends)[1]] if ends else text)

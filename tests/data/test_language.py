"""Rows of texts as token ids, and which of them are learnt."""

import numpy as np
import pytest

from lorax_flax.data.language import encoding
from lorax_flax.data.own.table import Row
from lorax_flax.data.tokenizers.tokenizer import Tokenizer
from lorax_flax.errors import LoraxError
from tests.data.chat.conftest import byte_level, sentence_piece

EOS = "<|im_end|>"
KINDS = {
  "bytes": lambda: byte_level(False),
  "trimmed": lambda: byte_level(True),
  "a BOS": sentence_piece,
}


@pytest.fixture(params=KINDS)
def tokenizer(request):
  return Tokenizer(KINDS[request.param](), {"eos_token": EOS})


def _completion(tokenizer, prompt, completion):
  rows = [Row("line 1", {"prompt": prompt, "completion": completion})]
  [(_, made)] = encoding.completions(rows, tokenizer)
  return made


@pytest.mark.parametrize(
  ("prompt", "completion"),
  [
    ("Hello! How are", " you today?"),
    ("The weather ", "in Paris"),
    ("", "sunny"),
    ("assistant\n", "Grüße, 你好 🙂"),
  ],
)
def test_the_completion_and_an_eos_are_learnt(tokenizer, prompt, completion):
  ids, learnt = _completion(tokenizer, prompt, completion)
  end = tokenizer.id_of("eos_token")
  full = tokenizer.encode(prompt + completion).ids
  assert ids.tolist() == [*full, end]
  text = tokenizer.decode(ids[learnt].tolist(), skip_special_tokens=False)
  # A token that reaches over the boundary is the completion's.
  assert text.removeprefix("\n").strip() == completion.strip() + EOS
  prompt_alone = tokenizer.encode(prompt).ids
  shared = min(len(prompt_alone), int(np.argmax(learnt)))
  assert ids[:shared].tolist() == prompt_alone[:shared]


def test_an_eos_that_is_there_is_not_doubled(tokenizer):
  end = tokenizer.id_of("eos_token")
  ids, learnt = _completion(tokenizer, "Hello!", " you" + EOS)
  assert ids.tolist().count(end) == 1
  assert ids[-1] == end
  assert learnt[-1]


def test_a_tokenizer_without_an_eos_is_an_error():
  with pytest.raises(LoraxError, match="the tokenizer has no eos_token"):
    _completion(Tokenizer(byte_level(False), {}), "a", "b")


@pytest.mark.parametrize("length", [2, 3, 5, 100])
@pytest.mark.parametrize("sizes", [(1,), (4, 1, 9), (5, 5), (17,)])
def test_windows_predict_every_token_but_the_first_once(length, sizes):
  stream = np.arange(sum(sizes), dtype=np.int32)
  documents = np.split(stream, np.cumsum(sizes)[:-1])
  outcomes = [
    (f"line {i}", encoding.Encoded(ids, np.ones(len(ids), bool)))
    for i, ids in enumerate(documents, 1)
  ]
  outcomes.insert(1, ("line 0", LoraxError("of no use")))
  made = list(encoding.windows(outcomes, length))
  rows = [each.ids_T for _, each in made if isinstance(each, encoding.Encoded)]
  assert len(made) == len(rows) + 1
  assert max(map(len, rows)) <= length
  assert [i for row in rows for i in row[1:]] == stream[1:].tolist()
  assert all(len(row) == length for row in rows[:-1])

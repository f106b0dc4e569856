"""Ids and masks of chats: tokens are learnt that overlap a learnt span."""

import re

import numpy as np
import pytest

from lorax_flax.data import chat as chats
from lorax_flax.errors import LoraxError
from tests.data.chat import test_masks, test_templates
from tests.data.chat.conftest import ONE, TURNS, assistant, named, sentence_piece, user

LONG = [
  each
  for n in range(40)
  for each in (user(f"Question {n} 你好?"), assistant(f" answer\n\n{n} 🙂 "))
]


@pytest.mark.parametrize("messages", [ONE, TURNS, LONG], ids=["one", "turns", "long"])
def test_mask_is_that_of_transformers(messages, tokenizer):
  peer = test_templates.peer("generation", tokenizer)
  expected = peer.apply_chat_template(messages, return_assistant_tokens_mask=True)
  ids, mask = chats.encode(messages, tokenizer, named("generation"))
  assert ids.tolist() == expected["input_ids"]
  assert mask.tolist() == [bool(x) for x in expected["assistant_masks"]]
  assert mask.any()


@pytest.mark.parametrize("messages", [ONE, TURNS, LONG], ids=["one", "turns", "long"])
def test_mask_by_prefixes_is_that_by_marks(messages, tokenizer):
  expected = chats.encode(messages, tokenizer, named("generation"))
  found = chats.encode(messages, tokenizer, named("chatml"))
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("name", test_masks.LEARNT)
def test_learnt_tokens_are_those_of_the_turns(name, some_tokenizer):
  ids, mask = chats.encode(TURNS, some_tokenizer, named(name))
  assert ids.dtype == np.int32
  assert mask.dtype == bool
  parts, _ = test_masks.marked(named(name), TURNS, some_tokenizer)
  learnt = some_tokenizer.decode(ids[mask].tolist(), skip_special_tokens=False)
  # Spaces that a header's token takes are decoded with it, not behind it.
  assert re.sub(r"\s", "", learnt) == re.sub(r"\s", "", "".join(parts))
  assert "user" not in learnt


def test_header_that_takes_spaces_is_not_learnt(some_tokenizer):
  ids, mask = chats.encode(
    [user("a"), assistant("\n Hi")], some_tokenizer, named("phi3")
  )
  header = some_tokenizer.token_to_id("<|assistant|>")
  assert header in ids
  assert header not in ids[mask]
  assert some_tokenizer.decode(ids[mask].tolist()) == "Hi"


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma2"])
def test_bos_is_not_doubled(name):
  tokenizer = sentence_piece()
  ids, _ = chats.encode(ONE, tokenizer, named(name, bos_token="<s>"))
  bos = tokenizer.token_to_id("<s>")
  assert ids[0] == bos
  assert ids[1] != bos


def test_real_model_learns_its_turns(smollm2):
  _, tokenizer, template = smollm2
  ids, mask = chats.encode(TURNS, tokenizer, template)
  # The first space of a turn is in one token with the new line of its header.
  assert tokenizer.decode(ids[mask].tolist(), skip_special_tokens=False) == (
    "Hi, how are you?<|im_end|>\n  Grüße, 你好 🙂! \n<|im_end|>See\n\nyou<|im_end|>"
  )
  assert "SmolLM" in tokenizer.decode(ids[~mask].tolist())


def test_error_names_the_example(some_tokenizer):
  rows = [ONE, [user("a")]]
  with pytest.raises(LoraxError, match="example 8: no message has the role assistant"):
    list(chats.encode_all(rows, some_tokenizer, named("chatml"), first=7))

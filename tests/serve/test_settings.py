"""Settings of decoding, and of a checkpoint's generation_config.json."""

import json

import pytest

from lorax_flax.errors import LoraxError
from lorax_flax.serve import ends
from lorax_flax.serve.ends import Ends
from lorax_flax.serve.settings import Decoding


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"max_new_tokens": 0}, "max_new_tokens is 0, and must be an integer from 1 up"),
    ({"max_new_tokens": True}, "max_new_tokens is True"),
    ({"top_k": 1.5, "temperature": 1.0}, "top_k is 1.5"),
    ({"temperature": -1.0}, "temperature is -1.0, and must be from 0 to inf"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"top_p": 0.0, "temperature": 1.0}, "top_p is 0, and must be more"),
    ({"top_p": 1.1, "temperature": 1.0}, "top_p is 1.1, and must be from 0 to 1"),
    ({"min_p": 2.0, "temperature": 1.0}, "min_p is 2.0"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0, and must be more"),
    ({"seed": 2**32, "temperature": 1.0}, "seed is 4294967296, and must be less"),
    ({"early_stopping": "nevr", "beams": 2}, "unknown early_stopping 'nevr'; did you"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9, and max_new"),
    ({"stop": ("a", "")}, "stop is .*must hold texts that are not empty"),
    ({"stop": "ab"}, "stop is 'ab'"),
    ({"top_p": 0.9}, "top_p=0.9 does nothing: temperature is 0"),
    ({"top_k": 3}, "top_k=3 does nothing"),
    ({"min_p": 0.1}, "min_p=0.1 does nothing"),
    ({"seed": 3}, "seed=3 does nothing"),
    ({"length_penalty": 2.0}, "length_penalty=2.0 does nothing: beams is 1"),
    ({"early_stopping": True}, "early_stopping=True does nothing"),
    ({"beams": 4, "temperature": 0.5}, "beams=4 and temperature=0.5: either search"),
    ({"beams": 4, "stop": ("a",)}, "beams=4 and stop"),
  ],
)
def test_settings_that_are_wrong_or_do_nothing_are_refused(fields, message):
  with pytest.raises(LoraxError, match=message):
    Decoding(**fields)


def _read(folder, generation=None, **config):
  folder.mkdir(exist_ok=True)
  if generation is not None:
    (folder / ends.FILE).write_text(json.dumps(generation))
  return ends.read(folder, config, 50)


def test_ends_are_of_the_generation_config_and_else_of_the_config(tmp_path):
  own = {"eos_token_id": [4, 9], "bos_token_id": 1, "temperature": 0.6, "top_p": 0.9}
  assert _read(tmp_path / "a", own, eos_token_id=7) == Ends((4, 9), 1)
  assert _read(tmp_path / "b", {}, eos_token_id=7) == Ends((), None)
  t5 = {"eos_token_id": 1, "decoder_start_token_id": 0, "bos_token_id": 3}
  assert _read(tmp_path / "c", **t5) == Ends((1,), 0)
  # The model can't write these.
  assert _read(tmp_path / "d", {"eos_token_id": [-1, 3, 50]}) == Ends((3,), None)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"suppress_tokens": [3]}, "suppress_tokens: not built here"),
    ({"forced_bos_token_id": 3}, "forced_bos_token_id: not built here"),
    ({"bad_words_ids": [[3]], "stop_strings": ["a"]}, "bad_words_ids, stop_strings"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', and must be an id or a list"),
  ],
)
def test_what_would_change_tokens_is_refused_by_name(tmp_path, fields, message):
  with pytest.raises(LoraxError, match=message):
    _read(tmp_path, fields)
  with pytest.raises(LoraxError, match=message):
    ends.read(tmp_path / "none", fields, 50)

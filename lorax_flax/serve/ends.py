"""Ends of a model's texts, by its generation_config.json or its config.json.

Of generation_config.json only the ids that end and begin a text are heeded.
do_sample, temperature and the like, which transformers applies, are set by `Decoding`
alone. What would force or forbid tokens is refused by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax_flax.data.tokenizers.tokenizer import Tokenizer
from lorax_flax.errors import LoraxError, listing
from lorax_flax.files import strict_json
from lorax_flax.hub.files import gguf_header

FILE = "generation_config.json"
# Fields that change which tokens come, and are not built here.
_REFUSED = (
  "bad_words_ids",
  "begin_suppress_tokens",
  "exponential_decay_length_penalty",
  "forced_bos_token_id",
  "forced_decoder_ids",
  "forced_eos_token_id",
  "sequence_bias",
  "stop_strings",
  "suppress_tokens",
)


@dataclass(frozen=True)
class Ends:
  """Ids around a model's texts.

  Attributes:
    eos: ids that end a text; none: a text has its full number of tokens.
    start: the id that a decoder starts with, where a model has an encoder too.
  """

  eos: tuple[int, ...] = ()
  start: int | None = None


def read(folder: Path, hf_config: Mapping[str, Any], vocab_size: int) -> Ends:
  """Reads the ids that end a checkpoint's texts.

  Args:
    folder: of the checkpoint; its generation_config.json decides where it has one, as
      in transformers.
    hf_config: the content of config.json, which decides elsewhere.
    vocab_size: number of tokens of the model.

  Raises:
    LoraxError: an id that is no integer, or a field that would force or forbid tokens.
  """
  file = folder / FILE
  has_file = gguf_header.find(folder) is None and file.is_file()
  fields = strict_json.read_object(file) if has_file else hf_config
  origin = str(file) if has_file else "config.json"
  if refused := [name for name in _REFUSED if fields.get(name)]:
    raise LoraxError(f"{origin}: {listing(refused)}: not built here")

  def ids(name: str) -> tuple[int, ...]:
    """Ids that the model has; others (-1 for none, a larger model's) never come."""
    value = fields.get(name)
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in found):
      raise LoraxError(
        f"{origin}: {name} is {value!r:.80}, and must be an id or a list"
      )
    return tuple(each for each in found if 0 <= each < vocab_size)

  starts = (*ids("decoder_start_token_id"), *ids("bos_token_id"))
  return Ends(ids("eos_token_id"), next(iter(starts), None))


def special_stops(stop: Sequence[str], tokenizer: Tokenizer) -> tuple[int, ...]:
  """Ids of the stop strings that are special tokens, which no text shows.

  Raises:
    LoraxError: a stop string that holds a special token beside other text.
  """
  added = tokenizer.backend.get_added_tokens_decoder()
  special = {token.content: i for i, token in added.items() if token.special}
  for text in stop:
    if text not in special and (inside := [s for s in special if s in text]):
      raise LoraxError(
        f"stop: {text!r} holds the special token {inside[0]!r}, which no text shows; "
        "give the token alone"
      )
  return tuple(special[text] for text in stop if text in special)

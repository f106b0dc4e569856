"""Lines of JSON, and the rows that a model is fed with.

What a line may hold follows from the model: a text, or two, where it takes token ids;
or its inputs as they are, under the names that its family's record has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorax_flax.data import pixels, tokens
from lorax_flax.data.pixels import Pixels
from lorax_flax.data.tokenize import load_tokenizer, tokenize
from lorax_flax.data.tokens import Tokens
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.files import strict_json
from lorax_flax.models import registry
from lorax_flax.models.family import Family

# The rows of a file: what a model is fed with.
Inputs = Tokens | Pixels

_TEXTS = ("text", "text_pair")


@dataclass(frozen=True)
class Names:
  """Names that the lines of a model may hold.

  Attributes:
    main: of the inputs as they are: "input_ids" or "pixel_values".
    inputs: of a line of inputs.
    texts: of a line of texts; none where the model takes no text.
    needed: of every line.
  """

  main: str
  inputs: frozenset[str]
  texts: frozenset[str]
  needed: frozenset[str]


def names(family: Family, config: Any) -> Names:
  """Names that the lines of a family may hold."""
  inputs = list(family.inputs(config))
  needed = set(inputs[1:]) - set(tokens.TEXT_INPUTS)
  texts = {*_TEXTS, *needed} if inputs[0] in tokens.TEXT_INPUTS else set()
  if family.task == "sequence-classification":
    # Such a model may be called without them, so that they are not in the record.
    inputs.append("token_type_ids")
  return Names(inputs[0], frozenset(inputs), frozenset(texts), frozenset(needed))


def read(file: Path, known: Names) -> list[dict[str, Any]]:
  """The objects of a file, all of texts or all of inputs; images as arrays.

  Raises:
    LoraxError: no such file, an empty one, or a line that is blank, no JSON object,
      of unknown names, or of another kind than the first; it names the line.
  """
  found: list[dict[str, Any]] = []
  for number, line in strict_json.lines(file):
    found.append(line)
    try:
      _check_kind(line, found[0], known)
      if pixels.INPUT in line:
        # At once: as Python's numbers they take eight times the room.
        line[pixels.INPUT] = pixels.from_nested(line[pixels.INPUT])
    except LoraxError as error:
      raise LoraxError(f"{file}: line {number} {error}") from error
  return found


def _check_kind(
  line: Mapping[str, Any], first: Mapping[str, Any], known: Names
) -> None:
  for name in line:
    if name not in known.texts | known.inputs:
      raise LoraxError(f"has an {unknown('name', name, known.texts | known.inputs)}")
  is_text = "text" in line
  if is_text == (known.main in line):
    either = f'either "text" or "{known.main}"' if known.texts else f'"{known.main}"'
    raise LoraxError(f"wants {either}")
  if mixed := line.keys() - (known.texts if is_text else known.inputs):
    raise LoraxError(
      f"has {min(mixed)!r}, which does not go with "
      f"{'text' if is_text else known.main!r}"
    )
  if missing := known.needed - line.keys():
    raise LoraxError(f"has no {min(missing)!r}")
  if is_text != ("text" in first):
    raise LoraxError("is of another kind than line 1: all are texts, or none is")


def rows(
  lines: Sequence[Mapping[str, Any]],
  loaded: registry.Loaded,
  known: Names,
  max_length: int | None,
  adapter: str | None = None,
) -> Inputs:
  """Model inputs of the lines; an error counts lines as examples, from 1.

  Args:
    adapter: a folder whose tokenizer takes the place of the base's, if it has one.
    max_length: number of tokens that texts are truncated to; None for the most that
      the model takes.
  """
  if pixels.INPUT in known.inputs:
    if max_length is not None:
      raise LoraxError(f"--max_length={max_length}, and this model takes no text")
    shape = loaded.family.inputs(loaded.config)[pixels.INPUT].shape[1:]
    return pixels.from_inputs(lines, shape)
  return _tokens(lines, loaded, known, max_length, adapter)


def _tokens(
  lines: Sequence[Any],
  loaded: registry.Loaded,
  known: Names,
  max_length: int | None,
  adapter: str | None,
) -> Tokens:
  room, vocab_size = loaded.max_length, loaded.config.vocab_size
  if max_length is not None and max_length > room:
    raise LoraxError(f"--max_length={max_length}, and this model takes {room} tokens")
  longest = max_length or room
  decoder = tokens.DECODER_INPUT in known.needed
  if "text" in lines[0]:
    found = tokenize(
      lines,
      load_tokenizer(loaded.folder, adapter),
      max_length=longest,
      token_types=loaded.token_types,
    )
    if decoder:
      found = tokens.with_decoder(found, lines)
  else:
    found = tokens.from_inputs(
      lines,
      pad_id=getattr(loaded.config, "pad_token_id", None) or 0,
      token_types=loaded.token_types,
      decoder=decoder,
    )
  lengths_N = found.lengths_N
  if len(empty := np.flatnonzero(lengths_N == 0)):
    raise LoraxError(f"example {empty[0] + 1} has no tokens")
  if len(long := np.flatnonzero(lengths_N > longest)):
    raise LoraxError(
      f"example {long[0] + 1} has {lengths_N[long[0]]} tokens, and at most "
      f"{longest} are taken"
    )
  tokens.check_ids(found, vocab_size, getattr(loaded.config, "type_vocab_size", 0))
  return found

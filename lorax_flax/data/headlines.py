"""News headlines, sarcastic or sincere: 8,000 for training and 3,000 held out."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from lorax_flax.data.examples import Example, Examples, Splits
from lorax_flax.errors import LoraxError, prefixed
from lorax_flax.hub import assets

TRAIN = 8_000
HELD_OUT = 3_000


def load() -> Examples:
  """The splits, from the asset "headlines", which is fetched on first use.

  Raises:
    LoraxError: the asset can't be fetched.
  """
  return split(_read(assets.path("headlines")))


def _read(file: Path) -> Iterable[Example]:
  """Lines of the evals package: the text is the user's turn, the label is `ideal`."""
  with file.open(encoding="utf-8") as lines:
    for number, line in enumerate(lines, 1):
      where, kinds = f"{file}:{number}", (ValueError, LookupError, TypeError)
      with prefixed(f"{where}: not a labelled headline", *kinds):
        row = json.loads(line)
        text, label = row["input"][1]["content"], ("0", "1").index(row["ideal"])
      yield {"text": text, "text_pair": None, "label": label}


def split(examples: Iterable[Example]) -> Examples:
  """Drops repeated headlines, and splits the rest by the hash of their text.

  The texts with the smallest hashes are for training, the next ones are held out: the
  splits depend neither on the order of the lines nor on repetitions.
  """
  by_key: dict[bytes, Example] = {}
  for example in examples:
    text = " ".join(example["text"].split())
    key = hashlib.sha256(text.lower().encode("utf-8")).digest()
    # Among spellings that differ only in case, the first in order is kept.
    if key not in by_key or text < by_key[key]["text"]:
      by_key[key] = {**example, "text": text}
  ordered = [by_key[key] for key in sorted(by_key)]
  if len(ordered) < TRAIN + HELD_OUT:
    raise LoraxError(
      f"{len(ordered)} different headlines, and {TRAIN + HELD_OUT} are needed"
    )
  return Splits(
    train=ordered[:TRAIN],
    evaluation={"validation": ordered[TRAIN : TRAIN + HELD_OUT]},
  )

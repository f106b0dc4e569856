"""Lines that show what was found in a language model's own data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from lorax_flax.data import pipeline
from lorax_flax.data.own import summary
from lorax_flax.data.own.splits import TRAIN
from lorax_flax.data.sequences import IGNORED, Sequences
from lorax_flax.data.tokenize import load_tokenizer
from lorax_flax.tasks.causal_lm.read import TOKEN_IDS, Found
from lorax_flax.tasks.causal_lm.settings import TextSettings

_EXAMPLES, _LONGEST = 3, 800  # that are shown, and characters of one
# Token ids -> text.
Decode = Callable[[list[int]], str]


def describe(
  settings: TextSettings, found: Found, trained: Sequences, folder: Path
) -> list[str]:
  """Lines about files, lengths, what is skipped, learnt and padded, and examples.

  Args:
    trained: the rows to train on, packed where the settings ask for it.
    folder: of the model, with its tokenizer.
  """
  rows = found.rows[TRAIN].rows
  lengths_N = np.concatenate([each.lengths_N for each in found.rows.values()])
  return [
    *summary.of_files(found.tables, found.form, settings.columns),
    *_windows(settings, found),
    summary.of_lengths(lengths_N, settings.max_length),
    *summary.of_skipped((each.file, each.skipped) for each in found.rows.values()),
    f"learnt: {_predicted(rows).sum():,} of {len(rows.labels_S):,} tokens in {TRAIN} "
    f"({_predicted(rows).mean():.1%}), which are in ⟦…⟧ below",
    *_padding(settings, rows, trained),
    *_examples(rows, _decoder(found.form, folder)),
  ]


def _predicted(rows: Sequences) -> np.ndarray:
  """Bool (S,): True for a token that is learnt, which a row's first never is."""
  learnt_S = rows.labels_S != IGNORED
  learnt_S[rows.tokens.offsets[:-1]] = False
  return learnt_S


def _windows(settings: TextSettings, found: Found) -> list[str]:
  if found.form != "text" or settings.documents == "rows":
    return []
  counts = [f"{len(each.rows):,} in {split}" for split, each in found.rows.items()]
  return [f"cut one after another into windows: {', '.join(counts)}"]


def _padding(settings: TextSettings, rows: Sequences, trained: Sequences) -> list[str]:
  def share(each: Sequences) -> str:
    lengths_N = each.lengths_N
    buckets = pipeline.choose_buckets(lengths_N, settings.buckets)
    return f"{pipeline.padding_share(lengths_N, buckets):.1%}"

  lines = [f"padding: {share(rows)} of a batch to train on"]
  if settings.packing:
    lines.append(
      f"packed: {len(rows):,} rows in {len(trained):,}, of which {share(trained)} is "
      "padding"
    )
  return lines


def _decoder(form: str, folder: Path) -> Decode:
  if form == TOKEN_IDS:  # Their tokenizer need not be there.
    return lambda ids: " ".join(map(str, ids))
  tokenizer = load_tokenizer(folder)
  return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def _examples(rows: Sequences, decode: Decode) -> list[str]:
  learnt_S, lines = _predicted(rows), []
  for number in range(min(_EXAMPLES, len(rows))):
    place = slice(*rows.tokens.offsets[number : number + 2])
    text = _marked(rows.tokens.input_ids_S[place], learnt_S[place], decode)
    if len(text) > _LONGEST:
      text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    lines.append(f"example: {text}")
  return lines


def _marked(ids_T: np.ndarray, learnt_T: np.ndarray, decode: Decode) -> str:
  """The text of a row, with ⟦…⟧ around what is learnt."""
  changes = np.flatnonzero(np.diff(learnt_T)) + 1
  parts = zip(np.split(ids_T, changes), np.split(learnt_T, changes), strict=True)
  texts = [(decode(ids.tolist()), learnt[0]) for ids, learnt in parts]
  return "".join(f"⟦{text}⟧" if learnt else text for text, learnt in texts)

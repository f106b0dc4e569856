"""Batch inference: a line of JSON in, a line of JSON out, in the same order.

  python -m experiments.predict --base=minilm --adapter=RUN/adapter \
    --input=IN.jsonl --out=OUT.jsonl

A line of IN.jsonl is {"text": …}, or {"text": …, "text_pair": …}, or the model's inputs
as they are: {"input_ids": […], "attention_mask": […], "token_type_ids": […]}, of which
the last two may be left out. All lines are of one kind. A line of OUT.jsonl holds
"logits", and "label" and "score" (its probability) where the head has classes.

The adapter is merged into the base first, so that it costs nothing per line.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track

from experiments import cli, merged
from lorax_flax.data import pipeline, tokens
from lorax_flax.data.tokenize import load_tokenizer, tokenize
from lorax_flax.errors import LoraxError, unknown

FLAGS = flags.FlagValues()
BASE = flags.DEFINE_string(
  "base",
  None,
  "The base: a folder, a name on the Hugging Face hub, or an alias (minilm).",
  flag_values=FLAGS,
  required=True,
)
ADAPTER = flags.DEFINE_string(
  "adapter",
  None,
  "The adapter: a PEFT folder, or one that convert wrote. Without one, the base's own "
  "head is used.",
  flag_values=FLAGS,
)
INPUT = flags.DEFINE_string(
  "input", None, "The lines to read, JSON.", flag_values=FLAGS, required=True
)
OUT = flags.DEFINE_string(
  "out", None, "The file to write.", flag_values=FLAGS, required=True
)
BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 32, "Lines computed at once.", lower_bound=1, flag_values=FLAGS
)
MAX_LENGTH = flags.DEFINE_integer(
  "max_length",
  None,
  "Texts are cut to so many tokens (default: what the model can take).",
  lower_bound=1,
  flag_values=FLAGS,
)

# Each length is compiled once; more lengths pad less.
_BUCKETS = 4
# Fewer batches than this need no progress bar.
_LONG = 50
_TEXTS = frozenset({"text", "text_pair"})
_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids"})


def predict(
  base: str,
  adapter: str | None,
  source: str,
  out: str,
  *,
  batch_size: int = 32,
  max_length: int | None = None,
) -> int:
  """Predicts every line of a file into another; see the flags. Returns their number."""
  target = Path(out).expanduser()
  if target.is_dir():
    raise LoraxError(f"--out={out} is a folder; it is to be a file")
  lines = read_lines(Path(source).expanduser())
  whole = merged.load(base, adapter)
  try:
    rows = _tokens(lines, whole, max_length)
    logits_NxC = _logits(rows, whole, batch_size)
  except LoraxError as error:
    # An example's number is its line's: a line is never skipped.
    message = str(error).replace("example ", "line ", 1)
    raise LoraxError(f"{source}: {message}") from error
  if len(bad := np.flatnonzero(~np.isfinite(logits_NxC).all(1))):
    raise LoraxError(f"{source}: line {bad[0] + 1} gives logits that are not finite")
  _write(target, (_result(logits_C, whole) for logits_C in logits_NxC))
  return len(lines)


def read_lines(file: Path) -> list[dict[str, Any]]:
  """The objects of a JSON lines file, each of one of the two kinds.

  Raises:
    LoraxError: no such file, an empty one, or a line that is blank, no JSON object,
      of unknown names, or of another kind than the first; it names the line.
  """
  if not file.is_file():
    raise LoraxError(f"no file {file}")
  lines: list[dict[str, Any]] = []
  with file.open("rb") as stream:
    for number, raw in enumerate(stream, 1):
      try:
        lines.append(_line(raw))
        _check_kind(lines[-1], lines[0])
      except LoraxError as error:
        raise LoraxError(f"{file}: line {number} {error}") from error
  if not lines:
    raise LoraxError(f"{file} is empty")
  return lines


def _line(raw: bytes) -> dict[str, Any]:
  if not raw.strip():
    raise LoraxError("is blank")
  try:
    line = json.loads(raw.decode("utf-8"))
  except (ValueError, RecursionError) as error:
    raise LoraxError(f"is not JSON: {error}") from error
  if not isinstance(line, dict):
    raise LoraxError(f"is no object: {line!r:.80}")
  return line


def _check_kind(line: Mapping[str, Any], first: Mapping[str, Any]) -> None:
  for name in line:
    if name not in _TEXTS | _INPUTS:
      raise LoraxError(f"has an {unknown('name', name, _TEXTS | _INPUTS)}")
  if ("text" in line) == ("input_ids" in line):
    raise LoraxError('wants either "text" or "input_ids"')
  wanted = _TEXTS if "text" in line else _INPUTS
  if mixed := line.keys() - wanted:
    raise LoraxError(
      f"has {sorted(mixed)[0]!r}, which does not go with {min(wanted)!r}"
    )
  if ("text" in line) != ("text" in first):
    raise LoraxError("is of another kind than line 1: all are texts, or none is")


def _tokens(
  lines: Sequence[Any], whole: merged.Merged, max_length: int | None
) -> tokens.Tokens:
  config, room = whole.loaded.config, whole.loaded.max_length
  if max_length is not None and max_length > room:
    raise LoraxError(f"--max_length={max_length}, and this model takes {room} tokens")
  token_types = whole.loaded.token_types
  if "text" in lines[0]:
    return tokenize(
      lines,
      load_tokenizer(whole.folder),
      max_length=max_length or room,
      token_types=token_types,
    )
  rows = tokens.from_inputs(lines, pad_id=config.pad_token_id, token_types=token_types)
  longest = max_length or room
  if len(long := np.flatnonzero(rows.lengths_N > longest)):
    raise LoraxError(
      f"example {long[0] + 1} has {rows.lengths_N[long[0]]} tokens, and at most "
      f"{longest} are taken"
    )
  # JAX clamps an index that is out of bounds: look before.
  _check_ids(rows, "input_ids", rows.input_ids_S, config.vocab_size)
  _check_ids(rows, "attention_mask", rows.attention_mask_S, 2)
  _check_ids(rows, "token_type_ids", rows.token_type_ids_S, config.type_vocab_size)
  return rows


def _check_ids(
  rows: tokens.Tokens, name: str, ids_S: np.ndarray | None, end: int
) -> None:
  if ids_S is None:
    return
  wrong = np.flatnonzero((ids_S < 0) | (ids_S >= end))
  if len(wrong):
    row = int(np.searchsorted(rows.offsets, wrong[0], side="right"))
    raise LoraxError(
      f"example {row}: {name} has {ids_S[wrong[0]]}, and goes from 0 to {end - 1}"
    )


def _logits(rows: tokens.Tokens, whole: merged.Merged, batch_size: int) -> np.ndarray:
  """Logits in the lines' order: float32 (N, C)."""
  room = whole.loaded.max_length
  chosen = pipeline.choose_buckets(rows.lengths_N, _BUCKETS)
  buckets = tuple(sorted({min(length, room) for length in chosen}))
  size = min(batch_size, len(rows))
  batches: Any = pipeline.evaluation(rows, pipeline.Shape(size, buckets))
  if len(batches) > _LONG:
    batches = track(batches, description="Predicting", console=Console(file=sys.stderr))
  module, params = whole.loaded.module, whole.loaded.params

  @jax.jit
  def apply(params, input_ids, attention_mask, token_type_ids):
    return module.apply(
      {"params": params}, input_ids, attention_mask, token_type_ids, deterministic=True
    )

  logits_NxC = np.empty((len(rows), len(whole.labels)), np.float32)
  for batch in batches:
    logits_BxC = apply(
      params, batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids")
    )
    real = batch["index"] >= 0
    logits_NxC[batch["index"][real]] = np.asarray(logits_BxC, np.float32)[real]
  return logits_NxC


def _result(logits_C: np.ndarray, whole: merged.Merged) -> dict[str, Any]:
  # Through the float32's own shortest digits: no digits of a float64 that it isn't.
  result: dict[str, Any] = {"logits": [float(str(x)) for x in logits_C]}
  if not whole.regression:
    odds_C = np.exp(logits_C.astype(np.float64) - logits_C.max())
    best = int(logits_C.argmax())
    result |= {"label": whole.labels[best], "score": float(odds_C[best] / odds_C.sum())}
  return result


def _write(target: Path, results: Iterator[Mapping[str, Any]]) -> None:
  """Writes beside the target and renames: the file is there whole, or not at all."""
  target.parent.mkdir(parents=True, exist_ok=True)
  number, scratch = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
  try:
    with open(number, "w", encoding="utf-8") as stream:
      for result in results:
        stream.write(json.dumps(result, ensure_ascii=False) + "\n")
    os.chmod(scratch, 0o666 & ~_umask())
    os.replace(scratch, target)
  except BaseException:
    os.unlink(scratch)
    raise


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask


def main() -> None:
  count = predict(
    BASE.value,
    ADAPTER.value,
    INPUT.value,
    OUT.value,
    batch_size=BATCH_SIZE.value,
    max_length=MAX_LENGTH.value,
  )
  print(f"Predictions: {OUT.value} ({count:,} lines)")


if __name__ == "__main__":
  cli.run(main, FLAGS)

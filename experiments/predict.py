"""Batch inference: a line of JSON in, a line of JSON out, in the same order.

  python -m experiments.predict --base=minilm --adapter=RUN/adapter \
    --input=IN.jsonl --out=OUT.jsonl

A line of IN.jsonl is {"text": …}, or {"text": …, "text_pair": …}, or the model's inputs
as they are: {"input_ids": […], "attention_mask": […], "token_type_ids": […]}, of which
the last two may be left out. A model with a decoder wants "decoder_input_ids" beside
either; an image classifier takes {"pixel_values": […]}, lists of channels, rows and
columns. All lines are of one kind.

A line of OUT.jsonl holds "logits", and "label" and "score" (its probability) where the
head has classes; "scores" too, each label's own, where config.json's problem_type is
multi_label_classification. A language model's logits are those of what follows the
last token; with --all_positions, of what follows each, null where the attention mask
is 0.

Either file may be a pipe, /dev/stdin or /dev/stdout, or "-" for these two.

The adapter is merged into the base first, so that it costs nothing per line; with
--quant it stays beside the base, whose kernels are quantised as they are read.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track

from experiments.cli import command as cli
from experiments.cli import model_flags
from experiments.inference import lines, merged, probabilities, results
from experiments.inference import logits as inference
from lorax_flax.errors import LoraxError
from lorax_flax.hub.resolve import resolve
from lorax_flax.models import registry

FLAGS = flags.FlagValues()
BASE = model_flags.base(FLAGS)
ADAPTER = model_flags.adapter(
  FLAGS, note="Without one, the base's own head is used.", required=False
)
QUANT = model_flags.quant(FLAGS)
OTHER_BASE = model_flags.other_base(FLAGS)
INPUT = flags.DEFINE_string(
  "input", None, "The lines to read, JSON.", flag_values=FLAGS, required=True
)
OUT = model_flags.out(FLAGS, kind="file")
BATCH_SIZE = flags.DEFINE_integer(
  "batch_size",
  32,
  "Largest number of lines of a batch.",
  lower_bound=1,
  flag_values=FLAGS,
)
MAX_LENGTH = flags.DEFINE_integer(
  "max_length",
  None,
  "Texts are cut to so many tokens (default: what the model can take).",
  lower_bound=1,
  flag_values=FLAGS,
)
ALL_POSITIONS = flags.DEFINE_bool(
  "all_positions",
  False,
  "A language model's logits at every position, not at the last alone.",
  flag_values=FLAGS,
)

# Fewer batches than this need no progress bar.
_LONG = 50


def predict(
  base: str,
  adapter: str | None,
  source: str,
  out: str,
  *,
  batch_size: int = 32,
  max_length: int | None = None,
  all_positions: bool = False,
  quant: str | None = None,
  other_base: bool = False,
) -> int:
  """Predicts every line of a file into another; see the flags. Returns their number."""
  target = results.target(out, source)
  hf_config = registry.read_config(resolve(base))
  family = registry.of(hf_config)
  if all_positions and family.has_labels:
    raise LoraxError(f"--all_positions: a {hf_config['model_type']} has no positions")
  known = lines.names(family, family.configure(hf_config))
  read = lines.read(Path(source).expanduser(), known)
  model = merged.load(base, adapter, quant, other_base)
  try:
    rows = lines.rows(read, model.loaded, known, max_length, adapter)
    results.write(target, _results(rows, model, batch_size, all_positions))
  except LoraxError as error:
    # An example's number is its line's: a line is never skipped.
    message = str(error).replace("example ", "line ", 1)
    raise LoraxError(f"{source}: {message}") from error
  return len(read)


def _results(
  rows: lines.Inputs, model: merged.Merged, batch_size: int, every: bool
) -> Iterator[dict[str, Any]]:
  """The result of each row, in the rows' order."""
  count = max(1, len(rows))
  found: Any = inference.logits(
    rows, model.loaded, batch_size, every=every, rest=model.rest
  )
  if count > _LONG * batch_size:
    bar = Console(file=sys.stderr)
    found = track(found, "Predicting", total=count, console=bar)
  for number, positions in enumerate(found, 1):
    if not all(each is None or np.isfinite(each).all() for each in positions):
      raise LoraxError(f"example {number} gives logits that are not finite")
    # Through the float32's own shortest digits: no digits of a float64 that it isn't.
    texts = [
      None if each is None else [float(str(x)) for x in each] for each in positions
    ]
    result: dict[str, Any] = {"logits": texts if every else texts[0]}
    if model.labels and model.problem_type != "regression":
      result |= _named(positions[0], model.labels, model.problem_type)
    yield result


def _named(
  logits_C: np.ndarray, labels: Sequence[str], problem_type: str | None
) -> dict[str, Any]:
  """The most probable label, and the probability of each where they are many."""
  scores_C, best = probabilities.scores(logits_C, problem_type), int(logits_C.argmax())
  found = {"label": labels[best], "score": float(scores_C[best])}
  if problem_type == "multi_label_classification":
    found["scores"] = dict(zip(labels, scores_C.tolist(), strict=True))
  return found


def main() -> None:
  count = predict(
    BASE.value,
    ADAPTER.value,
    INPUT.value,
    OUT.value,
    batch_size=BATCH_SIZE.value,
    max_length=MAX_LENGTH.value,
    all_positions=ALL_POSITIONS.value,
    quant=QUANT.value,
    other_base=OTHER_BASE.value,
  )
  results.report("Predictions", OUT.value, count)


if __name__ == "__main__":
  cli.run(main, FLAGS)

"""Generation: a prompt of JSON in, the text that follows it out, in the same order.

  python -m experiments.generate --base=smollm2 --adapter=RUN/adapter \
    --input=IN.jsonl --out=OUT.jsonl --max_new_tokens=64

A line of IN.jsonl is {"prompt": …}, a text to go on from; {"messages": […]}, a chat to
answer, written by the model's own template or --chat_template's; or {"input_ids": […]}.
A model with an encoder reads them there, and writes from its start token on.

A line of OUT.jsonl is {"text": …, "output_ids": […]}, the new tokens alone. The ids end
with the one that ended the text; the text has no special tokens, and ends before a stop
string. Without a tokenizer "text" is null.

By default each token is the most probable one; --beams searches, and --temperature
samples: the same text for a line, whatever lines are beside it. Settings in the base's
generation_config.json are not read, but for the tokens that end a text.

Either file may be a pipe, /dev/stdin or /dev/stdout, or "-" for these two.
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.progress import track

from experiments.cli import command as cli
from experiments.cli import decoding_flags, model_flags
from experiments.inference import prompts, results, writers
from lorax_flax.errors import LoraxError
from lorax_flax.serve import generate as generation
from lorax_flax.serve.generate import Generated
from lorax_flax.serve.settings import Decoding

FLAGS = flags.FlagValues()
BASE = model_flags.base(FLAGS)
ADAPTER = model_flags.adapter(FLAGS, required=False)
QUANT = model_flags.quant(FLAGS)
OTHER_BASE = model_flags.other_base(FLAGS)
INPUT = flags.DEFINE_string(
  "input", None, "The lines to read, JSON.", flag_values=FLAGS, required=True
)
OUT = model_flags.out(FLAGS, kind="file")
BATCH_SIZE = flags.DEFINE_integer(
  "batch_size",
  16,
  "Largest number of lines that are continued together.",
  lower_bound=1,
  flag_values=FLAGS,
)
CHAT_TEMPLATE = model_flags.chat_template(FLAGS)
DECODING = decoding_flags.define(FLAGS)

# Fewer lines than this need no progress bar.
_LONG = 200


def generate(
  base: str,
  adapter: str | None,
  source: str,
  out: str,
  decoding: Decoding,
  *,
  batch_size: int = 16,
  chat_template: str | None = None,
  quant: str | None = None,
  other_base: bool = False,
) -> int:
  """Continues a file's lines into another; see the flags. Returns their number."""
  target = results.target(out, source)
  writer, folder = writers.load(base, adapter, quant, other_base)
  vocab_size = writer.model.config.vocab_size
  file = Path(source).expanduser()
  rows = prompts.read(file, folder, writer.tokenizer, vocab_size, chat_template)
  written: list[Generated | None] = [None] * len(rows)
  try:
    found: Any = generation.generate(writer, rows, decoding, batch_size=batch_size)
    if len(rows) > _LONG:
      bar = Console(file=sys.stderr)
      found = track(found, "Generating", total=len(rows), console=bar)
    for number, each in found:
      written[number] = each
  except LoraxError as error:
    # An example's number is its line's: a line is never skipped.
    message = str(error).replace("example ", "line ", 1)
    raise LoraxError(f"{source}: {message}") from error
  lines = (
    {"text": each.text, "output_ids": list(each.ids)}
    for each in written
    if each is not None
  )
  results.write(target, lines)
  return len(rows)


def main() -> None:
  count = generate(
    BASE.value,
    ADAPTER.value,
    INPUT.value,
    OUT.value,
    DECODING(),
    batch_size=BATCH_SIZE.value,
    chat_template=CHAT_TEMPLATE.value,
    quant=QUANT.value,
    other_base=OTHER_BASE.value,
  )
  results.report("Texts", OUT.value, count)


if __name__ == "__main__":
  cli.run(main, FLAGS)

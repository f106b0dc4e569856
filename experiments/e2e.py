"""Trains on E2E, generates a text for each meaning representation, and scores them.

  python -m experiments.e2e --config=e2e_gpt2_medium.py --config.data.path=FOLDER \
    --workdir=DIR

Trains as `experiments.run` does, or resumes, and goes on where DIR holds the run,
finished. DIR/SPLIT then has prompts.jsonl, references.txt and outputs.jsonl, which
`experiments.generate` and `experiments.score` take as well, and scores.json; the table
is printed. Texts are searched as in the LoRA paper, with 10 beams, unless flags say
otherwise.
"""

from experiments.cli import collector, large_pages

if __name__ == "__main__":
  large_pages.restart()  # First, or all that is imported would be imported twice.
  collector.seldom()

from pathlib import Path

from absl import flags

from experiments import generate, run
from experiments.cli import command as cli
from experiments.cli import config_flag, decoding_flags, run_flags
from experiments.inference import results, scored
from lorax_flax.data import e2e as data
from lorax_flax.errors import LoraxError, check_known
from lorax_flax.files.workdir import write_json
from lorax_flax.jobs.settings import Settings
from lorax_flax.serve.settings import Decoding
from lorax_flax.tasks import e2e as task

FLAGS = flags.FlagValues()
config_flag.define(FLAGS)
WORKDIR = run_flags.workdir(FLAGS, "runs/CONFIG")
SPLIT = flags.DEFINE_string(
  "split", "test", f"What to write texts for: {', '.join(data.SPLITS)}.",
  flag_values=FLAGS,
)  # fmt: skip
ROWS = flags.DEFINE_integer(
  "rows",
  None,
  "Largest number of meaning representations, evenly spread; all by default.",
  lower_bound=1,
  flag_values=FLAGS,
)
BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 16, "Number of texts that are written together.", lower_bound=1,
  flag_values=FLAGS,
)  # fmt: skip
DECODING = decoding_flags.define(FLAGS)
# The released script's: table 11 of the paper has a length penalty of 0.9.
_RECIPE = {
  "beams": 10,
  "length_penalty": 0.8,
  "no_repeat_ngram": 4,
  "max_new_tokens": 64,
}
for _name, _value in _RECIPE.items():
  FLAGS.set_default(_name, _value)


def evaluate(
  settings: Settings,
  workdir: Path,
  decoding: Decoding,
  *,
  split: str = "test",
  rows: int | None = None,
  batch_size: int = 16,
) -> dict[str, float | None]:
  """Generates and scores the texts of a finished run; see the flags."""
  # Here, since --help and mistakes in flags need not wait for them.
  from lorax_flax.data.tokenize import load_tokenizer
  from lorax_flax.hub.resolve import resolve
  from lorax_flax.metrics import texts

  check_known("--split", split, data.SPLITS)
  if not isinstance(settings.data, task.E2ESettings):
    raise LoraxError(f"data.task is {settings.data.task}, and e2e is needed here")
  full = workdir / "model"
  base = str(full) if full.is_dir() else settings.model.path
  adapter = None if full.is_dir() else str(workdir / "adapter")
  # A model that was written in full has the numbers of the quantised base.
  quant = None if full.is_dir() else settings.model.quant
  groups = data.spread(task.groups(settings.data, split), rows)
  tokenizer = load_tokenizer(resolve(base))
  folder = workdir / split
  folder.mkdir(exist_ok=True)
  prompts, outputs = folder / "prompts.jsonl", folder / "outputs.jsonl"
  lines = ({"prompt": task.prompt(tokenizer, group.prompt)} for group in groups)
  results.write(prompts, lines)
  references = [group.references for group in groups]
  scored.write_references(folder / "references.txt", references)
  generate.generate(
    base,
    adapter,
    str(prompts),
    str(outputs),
    decoding,
    batch_size=batch_size,
    quant=quant,
  )
  found = dict(texts.scores(scored.outputs(outputs), references))
  write_json(folder / "scores.json", found)
  return found


def main() -> int:
  chosen = config_flag.read(FLAGS)
  settings = chosen.settings()
  decoding = DECODING()
  from experiments.cli import training

  workdir = Path(WORKDIR.value or config_flag.default_workdir(chosen.spec)).expanduser()
  if str(WORKDIR.value).startswith("gs://"):
    raise LoraxError(f"--workdir={WORKDIR.value}: texts are written to a folder here")

  def both() -> None:
    training.show(run.run(settings, workdir), workdir)
    found = evaluate(
      settings,
      workdir,
      decoding,
      split=SPLIT.value,
      rows=ROWS.value,
      batch_size=BATCH_SIZE.value,
    )
    print(scored.shown(found))

  return training.supervise(both)


if __name__ == "__main__":
  cli.run(main, FLAGS, config_flag.help_text)

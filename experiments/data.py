"""Shows what training would read of a file of yours, and trains nothing.

  lorax data FILE --config.model.path=MODEL
  lorax data FILE --config=classify.py --config.data.columns.label=sentiment

FILE is one of JSON lines, CSV, TSV or Parquet, or a folder with train and validation
files, or of images by class; MODEL a folder, a name on the Hugging Face hub, or an
alias (minilm). Shown are the form of the rows, their number by split, classes, lengths
in tokens, and examples as the model sees them. Without --config the task is the one
that MODEL is made for.
"""

import sys
from collections.abc import Mapping, Sequence

from absl import flags

from experiments.cli import command as cli
from experiments.cli import config_dict, config_flag
from lorax_flax.data.config import DataSettings
from lorax_flax.errors import LoraxError, check_known
from lorax_flax.hub.resolve import resolve
from lorax_flax.jobs import outline
from lorax_flax.jobs.settings import Settings
from lorax_flax.models import registry
from lorax_flax.tasks import task as tasks

# The task of a user's own data, by the kind of model.
TASKS: Mapping[str, str] = {
  "sequence-classification": "texts",
  "causal-lm": "next_token",
  "seq2seq-lm": "seq2seq",
  "image-classification": "images",
}
_CONFIG, _KIND = "classify.py", "sequence-classification"

FLAGS = flags.FlagValues()
config_flag.define(FLAGS)


def describe(settings: Settings) -> list[str]:
  """Lines that show what the settings' task reads.

  Raises:
    LoraxError: data or a model that training refuses too; a task that has nothing of
      the user's to show.
  """
  folder = resolve(settings.model.path)
  task, length = tasks.opened(settings.data), settings.data.max_length
  if task.describe is None:
    raise LoraxError(f"the task {task.name} reads no file that could be shown")
  hf_config = registry.read_config(folder)
  model = outline.check(
    settings.model, task, length, hf_config, str(folder), settings.soft
  )
  return task.describe(settings.data, registry.Located(**vars(model), folder=folder))


def chosen() -> Settings:
  """The settings of the flags; without --config those of the model's own task.

  Raises:
    LoraxError: a field that can't be, or a model that no task of a user's data trains.
  """
  given = FLAGS["config"].present
  if not given:
    FLAGS["config"].value = _CONFIG
  found = config_flag.read(FLAGS)
  if not given and "data.task" not in found.overridden:
    path = config_dict.value(found.values, "model.path")
    task = registry.of(registry.read_config(resolve(path))).task
    check_known("kind of model with data of your own", task, TASKS)
    values = config_dict.change(found.values, "data.task", TASKS[task])
    if task != _KIND and "data.buckets" not in found.overridden:
      # That of the config is for its own kind of model.
      values = config_dict.change(values, "data.buckets", DataSettings.buckets)
    return config_dict.settings(values, found.overridden)
  return found.settings()


def arguments(argv: Sequence[str]) -> list[str]:
  """The command line with its FILE as a flag, the field data.path."""
  changed = list(argv)
  for number, argument in enumerate(argv[1:], 1):
    before = argv[number - 1]
    is_value = number > 1 and before.startswith("-") and "=" not in before
    if not argument.startswith("-") and not is_value:
      changed[number] = f"--config.data.path={argument}"
      break
  return changed


def main() -> None:
  print("\n".join(describe(chosen())))


if __name__ == "__main__":
  cli.run(main, FLAGS, config_flag.help_text, arguments(sys.argv))

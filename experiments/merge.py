"""Writes a base with an adapter merged in, as a Hugging Face checkpoint.

  python -m experiments.merge --base=minilm --adapter=RUN/adapter --out=DIR

DIR then holds config.json, model.safetensors and the base's tokenizer; transformers
loads it as it would any other, and so does --base here. It is there whole, or not.
"""

from pathlib import Path

from absl import flags

from experiments.cli import command as cli
from experiments.inference import merged
from lorax_flax.errors import LoraxError
from lorax_flax.files import atomic
from lorax_flax.hub.checkpoints import export

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
  "The adapter: a PEFT folder, or one that convert wrote.",
  flag_values=FLAGS,
  required=True,
)
OUT = flags.DEFINE_string(
  "out", None, "The folder to write.", flag_values=FLAGS, required=True
)
OVERWRITE = flags.DEFINE_bool(
  "overwrite", False, "Replace a checkpoint that lies in --out.", flag_values=FLAGS
)


def merge(base: str, adapter: str, out: str, *, overwrite: bool = False) -> Path:
  """Merges and writes; see the flags. Returns the folder written."""
  folder = Path(out).expanduser()
  # Only a checkpoint is ever replaced: --out=~ --overwrite must not empty a home.
  may_replace = lambda old: overwrite and (old / "config.json").is_file()
  atomic.refuse_unless_free(folder, may_replace)
  whole = merged.load(base, adapter)
  for source in (whole.folder, Path(adapter).expanduser()):
    if source.resolve().is_relative_to(folder.resolve()):
      raise LoraxError(f"--out={out} would replace {source}, which is read from")
  export.write_checkpoint(
    folder,
    whole.loaded.params,
    whole.loaded.keymap,
    whole.loaded.hf_config,
    architecture=whole.loaded.family.architecture,
    labels=whole.labels,
    tokenizer_from=whole.folder,
    may_replace=may_replace,
  )
  return folder


def main() -> None:
  folder = merge(BASE.value, ADAPTER.value, OUT.value, overwrite=OVERWRITE.value)
  print(f"Merged checkpoint: {folder}")


if __name__ == "__main__":
  cli.run(main, FLAGS)

"""Writes a base with an adapter merged in, as a Hugging Face checkpoint.

  python -m experiments.merge --base=minilm --adapter=RUN/adapter --out=DIR

DIR then holds config.json, model.safetensors and what lies beside the base's weights:
its tokenizer (or the adapter's own), templates, settings; and a model card of its own
in the place of the base's. transformers loads it as it
would any other, and so does --base here. It is written atomically.
"""

from pathlib import Path

from absl import flags

from experiments.cli import command as cli
from experiments.cli import model_flags
from experiments.inference import merged
from lorax_flax.files import atomic
from lorax_flax.hub import card
from lorax_flax.hub.checkpoints import export
from lorax_flax.jobs import usage

FLAGS = flags.FlagValues()
BASE = model_flags.base(FLAGS)
ADAPTER = model_flags.adapter(FLAGS)
OUT = model_flags.out(FLAGS)
OVERWRITE = model_flags.overwrite(FLAGS, "a checkpoint in --out that was written here")


def merge(base: str, adapter: str, out: str, *, overwrite: bool = False) -> Path:
  """Merges and writes; see the flags. Returns the folder written."""
  folder = Path(out).expanduser()
  atomic.refuse_inputs(folder, (Path(base).expanduser(), Path(adapter).expanduser()))
  atomic.refuse_unless_free(folder, overwrite=overwrite)
  model = merged.load(base, adapter)
  export.write_checkpoint(
    folder,
    model.loaded.params,
    model.loaded.keymap,
    model.loaded.hf_config,
    architecture=model.loaded.family.architecture,
    labels=None,
    base=model.loaded.folder,
    adapter=Path(adapter).expanduser(),
    card=_card(base, adapter, model),
    overwrite=overwrite,
  )
  return folder


def _card(base: str, adapter: str, model: merged.Merged) -> str:
  task = model.loaded.family.task
  data = {
    "base_model": card.base_model(base),
    "library_name": "transformers",
    **card.license_of(base, model.loaded.folder),
    "pipeline_tag": usage.PIPELINES[task],
    "tags": ["lorax_flax", "lora", "merged"],
  }
  parts = {"Parts": {"base": base, "adapter": adapter}}
  title = f"{base} with an adapter merged in"
  return card.text(title, data, parts, usage.of_model(task, "."))


def main() -> None:
  folder = merge(BASE.value, ADAPTER.value, OUT.value, overwrite=OVERWRITE.value)
  print(f"Merged checkpoint: {folder}")


if __name__ == "__main__":
  cli.run(main, FLAGS)

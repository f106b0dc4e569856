"""Writes a base with an adapter merged in, as a Hugging Face checkpoint or as GGUF.

  python -m experiments.merge --base=minilm --adapter=RUN/adapter --out=DIR
  python -m experiments.merge --base=smollm2 --adapter=RUN/adapter --out=DIR \
    --format=gguf --dtype=q8_0

DIR then holds config.json, model.safetensors and what lies beside the base's weights:
its tokenizer (or the adapter's own), templates, settings; and a model card of its own
in the place of the base's. transformers loads it as it
would any other, and so does --base here. It is written atomically.

--format=gguf writes model.gguf instead, which llama.cpp loads, with the tokenizer and
the chat template inside. Its matrices keep their dtype unless --dtype names another.
"""

from pathlib import Path

from absl import flags

from experiments.cli import command as cli
from experiments.cli import model_flags
from experiments.inference import merged
from lorax_flax.data.chat import files as chat_files
from lorax_flax.data.tokenizers import tokenizer as tokenizers
from lorax_flax.errors import LoraxError, check_known
from lorax_flax.files import atomic
from lorax_flax.hub import card
from lorax_flax.hub.checkpoints import beside, export, export_gguf
from lorax_flax.hub.files import gguf_vocabulary, gguf_writer
from lorax_flax.jobs import usage
from lorax_flax.models import gguf

FORMATS = ("transformers", "gguf")

FLAGS = flags.FlagValues()
BASE = model_flags.base(FLAGS)
ADAPTER = model_flags.adapter(FLAGS)
OUT = model_flags.out(FLAGS)
FORMAT = flags.DEFINE_string(
  "format",
  "transformers",
  f"The form of what is written: {', '.join(FORMATS)}.",
  flag_values=FLAGS,
)
DTYPE = flags.DEFINE_string(
  "dtype",
  None,
  f"The numbers of a GGUF file's matrices: {', '.join(gguf_writer.KINDS)} (default:"
  " as they are).",
  flag_values=FLAGS,
)
OVERWRITE = model_flags.overwrite(FLAGS, "a checkpoint in --out that was written here")


def merge(
  base: str,
  adapter: str,
  out: str,
  form: str = "transformers",
  *,
  dtype: str | None = None,
  overwrite: bool = False,
) -> Path:
  """Merges and writes; see the flags. Returns the folder written."""
  check_known("--format", form, FORMATS)
  if dtype is not None:
    check_known("--dtype", dtype, gguf_writer.KINDS)
    if form != "gguf":
      raise LoraxError("--dtype is a GGUF file's: it goes with --format=gguf")
  folder = Path(out).expanduser()
  atomic.refuse_inputs(folder, (Path(base).expanduser(), Path(adapter).expanduser()))
  atomic.refuse_unless_free(folder, overwrite=overwrite)
  model = merged.load(base, adapter)
  source = Path(adapter).expanduser()
  text = _card(base, adapter, model, form)
  if form == "gguf":
    _write_gguf(folder, base, source, model, dtype, text, overwrite)
    return folder
  export.write_checkpoint(
    folder,
    model.loaded.params,
    model.loaded.keymap,
    model.loaded.hf_config,
    architecture=model.loaded.family.architecture,
    labels=None,
    base=model.loaded.folder,
    adapter=source,
    card=text,
    overwrite=overwrite,
  )
  return folder


def _write_gguf(
  folder: Path,
  base: str,
  adapter: Path,
  model: merged.Merged,
  dtype: str | None,
  text: str,
  overwrite: bool,
) -> None:
  loaded = model.loaded
  described = gguf.describe(loaded)
  tokenizer = tokenizers.load(loaded.folder, adapter)
  own = beside.tokenizer_folder(loaded.folder, adapter)
  vocabulary = gguf_vocabulary.metadata(
    tokenizer.backend,
    tokenizer.special,
    chat_files.texts(own),
    loaded.config.vocab_size,
  )
  named = {"general.type": "model", "general.name": Path(base).stem}
  export_gguf.write(
    folder,
    loaded.params,
    loaded.keymap,
    described.architecture,
    described.config,
    metadata=named | described.metadata | vocabulary,
    tensors=described.tensors,
    dtype=dtype,
    card=text,
    overwrite=overwrite,
  )


def _card(base: str, adapter: str, model: merged.Merged, form: str) -> str:
  task = model.loaded.family.task
  data = {
    "base_model": card.base_model(base),
    "library_name": "transformers" if form == "transformers" else "llama.cpp",
    **card.license_of(base, model.loaded.folder),
    "pipeline_tag": usage.PIPELINES[task],
    "tags": ["lorax_flax", "lora", "merged"],
  }
  parts = {"Parts": {"base": base, "adapter": adapter}}
  title = f"{base} with an adapter merged in"
  if form == "gguf":
    code = {"Run": f"llama-cli -m {export_gguf.FILE}"}
  else:
    code = usage.of_model(task, ".")
  return card.text(title, data, parts, code)


def main() -> None:
  folder = merge(
    BASE.value,
    ADAPTER.value,
    OUT.value,
    FORMAT.value,
    dtype=DTYPE.value,
    overwrite=OVERWRITE.value,
  )
  print(f"Merged checkpoint: {folder}")


if __name__ == "__main__":
  cli.run(main, FLAGS)

"""A base with an adapter that writes texts: what `generate` and `chat` run."""

from pathlib import Path

from experiments.inference import merged
from lorax_flax.data.tokenize import load_tokenizer
from lorax_flax.hub.checkpoints import beside
from lorax_flax.serve import generate as generation
from lorax_flax.serve.generate import Writer


def load(
  base: str, adapter: str | None, quant: str | None = None, other_base: bool = False
) -> tuple[Writer, Path]:
  """Loads a writer with the tokenizer of the adapter, where it has one, or the base.

  Args:
    quant, other_base: as of `merged.load`.

  Returns:
    The writer, and the folder of the tokenizer and its chat template.

  Raises:
    LoraxError: what the readers raise; a model that doesn't generate.
  """
  model = merged.load(base, adapter, quant, other_base)
  loaded = model.loaded
  own = None if adapter is None else Path(adapter).expanduser()
  folder, tokenizer = beside.tokenizer_folder(loaded.folder, own), None
  if beside.has_tokenizer(folder):
    tokenizer = load_tokenizer(loaded.folder, adapter)
  return generation.writer(loaded, model.rest, tokenizer), folder

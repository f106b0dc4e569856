"""A base with an adapter that writes texts: what `generate` and `chat` run."""

from pathlib import Path

from experiments.inference import merged
from lorax_flax.data.tokenize import load_tokenizer
from lorax_flax.hub.checkpoints import beside
from lorax_flax.serve import generate as generation
from lorax_flax.serve.generate import Writer


def load(
  base: str, adapter: str | None, quant: str | None = None
) -> tuple[Writer, Path]:
  """Loads a writer with the tokenizer of the adapter, where it has one, or the base.

  Args:
    quant: as of `merged.load`.

  Returns:
    The writer, and the folder of the tokenizer and its chat template.

  Raises:
    LoraxError: what the readers raise; a model that doesn't generate.
  """
  model = merged.load(base, adapter, apply=True, quant=quant)
  loaded = model.loaded
  own = adapter is not None and beside.has_tokenizer(Path(adapter).expanduser())
  folder = Path(adapter).expanduser() if adapter is not None and own else loaded.folder
  has_tokenizer = own or beside.has_tokenizer(loaded.folder)
  tokenizer = load_tokenizer(loaded.folder, adapter) if has_tokenizer else None
  return generation.writer(loaded, model.rest, tokenizer), folder

"""The forms in which a merged model is written, by name."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax_flax.data.chat import files as chat_files
from lorax_flax.data.tokenizers import tokenizer as tokenizers
from lorax_flax.hub.checkpoints import (
  beside,
  export,
  export_gguf,
  export_orbax,
  export_stablehlo,
)
from lorax_flax.hub.files import gguf_vocabulary
from lorax_flax.jobs import usage
from lorax_flax.models import gguf, stablehlo
from lorax_flax.models.registry import Loaded


@dataclass(frozen=True)
class Form:
  """One form.

  Attributes:
    library: what loads it, by the hub's name.
    usage: (model) -> code that runs it, by heading.
    write: (folder, model, base and adapter as they were given, dtype of a GGUF file's
      matrices, card=, receipt=, overwrite=), all or nothing.
  """

  library: str
  usage: Callable[[Loaded], dict[str, str]]
  write: Callable[..., None]


def _checkpoint(
  folder: Path, model: Loaded, base: str, adapter: Path, dtype: None, **options: Any
) -> None:
  del base, dtype
  export.write_checkpoint(
    folder,
    model.params,
    model.keymap,
    model.hf_config,
    architecture=model.family.architecture,
    labels=None,
    base=model.folder,
    adapter=adapter,
    **options,
  )


def _gguf(
  folder: Path, model: Loaded, base: str, adapter: Path, dtype: str | None, **texts: Any
) -> None:
  described = gguf.describe(model)
  tokenizer = tokenizers.load(model.folder, adapter)
  own = beside.tokenizer_folder(model.folder, adapter)
  vocabulary = gguf_vocabulary.metadata(
    tokenizer.backend,
    tokenizer.special,
    chat_files.texts(own),
    model.config.vocab_size,
  )
  named = {"general.type": "model", "general.name": Path(base).stem}
  export_gguf.write(
    folder,
    model.params,
    model.keymap,
    described.architecture,
    described.config,
    metadata=named | described.metadata | vocabulary,
    tensors=described.tensors,
    dtype=dtype,
    **texts,
  )


def _stablehlo(
  folder: Path, model: Loaded, base: str, adapter: Path, dtype: None, **texts: Any
) -> None:
  del base, dtype
  has_labels = model.family.has_labels
  # First, since it refuses what no weight holds.
  leaves = export.leaves(model.params, model.keymap)
  export_stablehlo.write(
    folder,
    stablehlo.of_model(model, model.params),
    leaves,
    labels=model.hf_config.get("id2label") if has_labels else None,
    base=model.folder,
    adapter=adapter,
    **texts,
  )


FORMS = {
  "transformers": Form(
    "transformers", lambda model: usage.of_model(model.family.task, "."), _checkpoint
  ),
  "orbax": Form(
    "jax",
    lambda model: usage.of_orbax(export_orbax.FOLDER),
    functools.partial(_checkpoint, write_weights=export_orbax.write),
  ),
  "gguf": Form(
    "llama.cpp", lambda model: {"Run": f"llama-cli -m {export_gguf.FILE}"}, _gguf
  ),
  "stablehlo": Form(
    "jax", lambda model: usage.of_stablehlo(stablehlo.inputs(model)), _stablehlo
  ),
}

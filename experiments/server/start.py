"""Models that answer, made of a base and of the settings of a server."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.server.classifiers import Classifiers
from experiments.server.language import Language
from lorax_flax.errors import LoraxError
from lorax_flax.models.registry import Loaded

log = logging.getLogger(__name__)


def served(
  loaded: Loaded,
  name: str,
  root: Path | None,
  *,
  language: Mapping[str, Any],
  quant: str | None = None,
  other_base: bool = False,
) -> Language | Classifiers:
  """Makes what answers for a base.

  Args:
    root: the folder of adapters.
    language: settings of a language model, as of `Language`; a `length` beyond the
      model's is the model's.
    quant: with which the base was loaded.
    other_base: whether adapters of other bases are served; see `with_adapter.load`.

  Raises:
    LoraxError: a model of another task.
  """
  task = loaded.family.task
  if task == "sequence-classification":
    return Classifiers(
      loaded,
      name,
      root,
      waiting=language["waiting"],
      quant=quant,
      other_base=other_base,
    )
  if task != "causal-lm":
    kind = loaded.hf_config["model_type"]
    raise LoraxError(
      f"a {kind} is no language model, nor a classifier of texts: `lorax generate` and"
      " `lorax predict` run it"
    )
  length = min(language["length"], loaded.max_length)
  settings = {**language, "length": length, "other_base": other_base}
  return Language(loaded, name, root, **settings)


def keys(given: Sequence[str], file: str | None) -> list[str]:
  """API keys, given or a file's lines.

  Raises:
    LoraxError: a file that can't be read or has no key, or an empty key.
  """
  found = list(given)
  if file is not None:
    try:
      lines = Path(file).expanduser().read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
      raise LoraxError(f"cannot read {file}: {error}") from error
    own = [line.strip() for line in lines if line.strip()]
    if not own:
      raise LoraxError(f"{file} has no key")
    found += own
  if not all(found):
    raise LoraxError("an API key is empty")
  return found

"""A base and an adapter of any form, read together: the base is made to fit."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lorax_flax.hub.adapters import any as adapters
from lorax_flax.hub.adapters.native import Saved
from lorax_flax.hub.peft import folder as peft
from lorax_flax.hub.resolve import resolve
from lorax_flax.models import gguf, registry

log = logging.getLogger(__name__)


def load(
  base: str,
  adapter: str | Path,
  *,
  alpha: float | None = None,
  enable_lora: Sequence[bool] | None = None,
) -> tuple[registry.Loaded, Saved]:
  """Loads a base with a head of the adapter's width, untied and resized as it needs.

  Args:
    base: a folder, an alias or a hub name.
    adapter: of any form.
    alpha, enable_lora: as of `adapters.read`.

  Raises:
    LoraxError: what the readers raise.
  """
  folder = resolve(base)
  model = registry.outline(registry.read_config(folder))
  needs = adapters.needs(adapter, model.keymap)
  rows = getattr(model.config, "vocab_size", None)
  if needs.vocab_size not in (None, rows):
    log.warning(
      f"{base}: its vocabulary of {rows} tokens is made {needs.vocab_size}, as in "
      f"{adapter}"
    )
  if needs.untie:
    log.warning(
      f"{base}: its tied tables get a weight each, since {adapter} changes them apart"
    )
  loaded = registry.load(
    folder,
    scan=needs.scan,
    num_labels=needs.num_labels,
    new_head=needs.num_labels is not None,
    untie=needs.untie,
    vocab_size=needs.vocab_size,
  )
  if needs.vocab_size is not None:
    tables = peft.with_tables(adapter, loaded.params, loaded.keymap)
    loaded = replace(loaded, params=tables)
  saved = adapters.read(
    adapter,
    loaded.params,
    loaded.keymap,
    heads=gguf.heads(loaded.config),
    alpha=alpha,
    enable_lora=enable_lora,
  )
  if saved.base_name is not None and not _is_same(saved.base_name, base, loaded):
    log.warning(
      f"{adapter} says that its base is {saved.base_name}, and the base given is "
      f"{base}: on other weights than its own an adapter means nothing"
    )
  return loaded, replace(saved, untied=not loaded.keymap.ties)


def _is_same(name: str, base: str, loaded: registry.Loaded) -> bool:
  """True where a base's recorded name may mean this base."""
  known = {base, str(loaded.folder), str(loaded.hf_config.get("_name_or_path"))}
  ends = {Path(each).expanduser().name.lower() for each in known}
  return Path(name).name.lower() in ends

"""A base and adapters of any form, read together: the base is made to fit."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorax_flax.errors import LoraxError, listing
from lorax_flax.hub import provenance
from lorax_flax.hub.adapters import any as adapters
from lorax_flax.hub.adapters.native import Saved
from lorax_flax.hub.peft import folder as peft
from lorax_flax.hub.resolve import resolve
from lorax_flax.models import gguf, registry
from lorax_flax.models.soft import SoftSettings

log = logging.getLogger(__name__)


def load(
  base: str,
  adapter: str | Path,
  *,
  alpha: float | None = None,
  enable_lora: Sequence[bool] | None = None,
  quant: str | None = None,
  param_dtype: str | None = None,
  other_base: bool = False,
  deferred: bool = False,
) -> tuple[registry.Loaded, Saved]:
  """Loads a base with a head of the adapter's width, untied and resized as it needs.

  Args:
    base: a folder, an alias or a hub name.
    adapter: of any form.
    alpha, enable_lora: as of `adapters.read`.
    quant, param_dtype, deferred: as of `registry.load`.
    other_base: whether the base may be another than the adapter's provenance.json
      says; see `base_check`.

  Raises:
    LoraxError: what the readers raise; another base than the adapter's.
  """
  loaded, (saved,) = load_all(
    base,
    [adapter],
    alpha=alpha,
    enable_lora=enable_lora,
    quant=quant,
    param_dtype=param_dtype,
    other_base=other_base,
    deferred=deferred,
  )
  return loaded, saved


def load_all(
  base: str,
  sources: Sequence[str | Path],
  *,
  alpha: float | None = None,
  enable_lora: Sequence[bool] | None = None,
  quant: str | None = None,
  param_dtype: str | None = None,
  other_base: bool = False,
  deferred: bool = False,
) -> tuple[registry.Loaded, list[Saved]]:
  """Loads a base and several adapters, which must fit the same base; as `load`."""
  folder = resolve(base)
  if not other_base:
    check = base_check(folder)
    for source in sources:
      check(source)
  model = registry.outline(registry.read_config(folder))
  needs = {source: adapters.needs(source, model.keymap) for source in sources}
  num_labels = _agreed(base, "labels", {s: n.num_labels for s, n in needs.items()})
  vocab_size = _agreed(base, "tokens", {s: n.vocab_size for s, n in needs.items()})
  rows = getattr(model.config, "vocab_size", None)
  if vocab_size not in (None, rows):
    log.warning(
      f"{base}: its vocabulary of {rows} tokens is made {vocab_size}, as in "
      f"{' and '.join(str(s) for s, n in needs.items() if n.vocab_size)}"
    )
  soft = next(iter(needs.values())).soft
  if any(each.soft != soft for each in needs.values()):
    each_has = (f"{s} has {(n.soft or {}).get('method')}" for s, n in needs.items())
    raise LoraxError(
      f"{base} cannot be the base of all: of states beside the weights (soft.method) "
      f"{', '.join(each_has)}"
    )
  untie = [str(source) for source, each in needs.items() if each.untie]
  if untie:
    log.warning(
      f"{base}: its tied tables get a weight each, since {' and '.join(untie)} changes "
      "them apart"
    )
  loaded = registry.load(
    folder,
    scan=any(each.scan for each in needs.values()),
    num_labels=num_labels,
    new_head=num_labels is not None,
    untie=bool(untie),
    vocab_size=vocab_size,
    soft=None if soft is None else SoftSettings(**soft),
    quant=quant,
    param_dtype=param_dtype,
    deferred=deferred,
  )
  for source, each in needs.items():
    if each.vocab_size is not None:
      tables = peft.with_tables(source, loaded.params, loaded.keymap)
      loaded = replace(loaded, params=tables)
  return loaded, [
    _read(base, loaded, source, alpha=alpha, enable_lora=enable_lora)
    for source in sources
  ]


def base_check(folder: Path) -> Callable[[str | Path], None]:
  """The check that an adapter was trained on the weights of a base.

  It raises LoraxError, by a sample of each weight (see `digests.sampled`), which is
  read once, where the first adapter has a provenance.json; others pass. Weights that
  are stored in another dtype or in other parts are logged and not compared: `lorax
  verify` compares all.

  Args:
    folder: of the base.
  """
  sampled = functools.cache(lambda: provenance.sampled(registry.stored(folder)))

  def check(adapter: str | Path) -> None:
    about = provenance.read(adapter)
    if about is None:
      return
    differ = provenance.compare(about, sampled())
    if differ.numbers:
      raise LoraxError(
        f"{adapter} was trained on other weights than those in {folder}: by its "
        f"{provenance.FILE}, {len(differ.numbers)} of {len(about['base']['weights'])} "
        f"differ: {listing(differ.numbers, 4)}. Give its own base, "
        f"{about['base'].get('name')}, or --other_base (other_base=True) to load it "
        "all the same"
      )
    for what, keys in (("dtype", differ.dtypes), ("form", differ.absent)):
      if keys:
        log.warning(
          f"{adapter} was trained on a base that stores {listing(keys, 4)} in another "
          f"{what} than {folder}: not compared"
        )

  return check


def _agreed(base: str, what: str, sizes: Mapping[str | Path, int | None]) -> int | None:
  """The size that the adapters which need one have in common."""
  given = {source: size for source, size in sizes.items() if size is not None}
  if len({*given.values()}) > 1:
    each = ", ".join(f"{source} has {size}" for source, size in given.items())
    raise LoraxError(f"{base} cannot be the base of all: of {what} {each}")
  return next(iter(given.values()), None)


def _read(
  base: str, loaded: registry.Loaded, adapter: str | Path, **of_loralib: Any
) -> Saved:
  """One adapter of a base that fits it."""
  saved = adapters.read(
    adapter,
    loaded.params,
    loaded.keymap,
    heads=gguf.heads(loaded.config),
    **of_loralib,
  )
  if saved.base_name is not None and not _is_same(saved.base_name, base, loaded):
    log.warning(
      f"{adapter} says that its base is {saved.base_name}, and the base given is "
      f"{base}: on other weights than its own an adapter means nothing"
    )
  return replace(saved, untied=not loaded.keymap.ties)


def _is_same(name: str, base: str, loaded: registry.Loaded) -> bool:
  """True where a base's recorded name may mean this base."""
  known = {base, str(loaded.folder), str(loaded.hf_config.get("_name_or_path"))}
  ends = {Path(each).expanduser().name.lower() for each in known}
  return Path(name).name.lower() in ends

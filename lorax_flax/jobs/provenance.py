"""Proofs of adapters: what an exported one was made from, and the check of it."""

import functools
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorax_flax.adapt.stacking import has_layer
from lorax_flax.distributed import processes
from lorax_flax.errors import LoraxError, listing
from lorax_flax.hub import provenance
from lorax_flax.hub.resolve import resolve
from lorax_flax.jobs import receipt
from lorax_flax.jobs.settings import Settings
from lorax_flax.methods import METHODS, Adapter, Delta, Tuned
from lorax_flax.models import registry, with_adapter
from lorax_flax.sharding import mesh as meshes
from lorax_flax.version import __version__

_LIBRARIES = ("jax", "jaxlib", "flax", "numpy")
_LOGITS = 256  # that are kept
# Largest difference of a logit from the recorded one, as a share of the largest logit:
# devices and versions of JAX differ by their rounding.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verdict:
  """Sentences on what of an adapter's proof holds, and on what fails."""

  holds: tuple[str, ...]
  fails: tuple[str, ...]


def prover(
  model: registry.Loaded, inputs: Mapping[str, str]
) -> Callable[[Settings, registry.Loaded, Adapter], dict[str, Any]]:
  """The function (settings, base, adapter) -> content of provenance.json.

  Every process calls it with the adapter of a run; the first one returns the content.
  The digests of the base and the program of the probe are made once for all runs.

  Args:
    model: that the runs have in common.
    inputs: digests by name, of `lorax_flax.jobs.fingerprint`.
  """
  logits = receipt.probed(model)
  folder = model.folder  # Alone: the weights may leave memory.
  weights = functools.cache(lambda: _records(folder))

  def prove(
    settings: Settings, base: registry.Loaded, adapter: Adapter
  ) -> dict[str, Any]:
    found = meshes.gather(logits(base.params, adapter))
    if not processes.first():
      return {}
    brought = _brought(base, adapter)
    return {
      "base": {
        "name": settings.model.path,
        "quant": settings.model.quant,
        "param_dtype": settings.model.param_dtype,
        "weights": {k: each for k, each in weights().items() if k not in brought},
      },
      "plan": {
        "config": asdict(settings.lora),
        "deltas": {path: _plan(delta) for path, delta in adapter.items()},
      },
      # The base is known by its weights, wherever its files are.
      "inputs": {name: digest for name, digest in inputs.items() if name != "base"},
      "seed": settings.train.seed,
      "versions": _versions(),
      "probe": {"shape": list(found.shape), "logits": _chosen(found).tolist()},
    }

  return prove


def verify(base: str, adapter: str | Path) -> Verdict:
  """Checks an adapter's provenance.json against the adapter and a base.

  Args:
    base: a folder, an alias or a hub name.

  Raises:
    LoraxError: an adapter without the file; what the readers raise of the base.
  """
  folder = Path(adapter).expanduser()
  about = provenance.read(folder)
  if about is None:
    raise LoraxError(f"{folder} has no {provenance.FILE}: training writes it")
  parts = _files(folder, about), _weights(base, about), _logits(base, folder, about)
  holds = tuple(line for line, fails in parts if not fails)
  return Verdict(holds, tuple(line for line, fails in parts if fails))


def _files(folder: Path, about: Mapping[str, Any]) -> tuple[str, bool]:
  changed = provenance.changed_files(folder, about)
  if not changed:
    return f"the adapter's {len(about['files'])} files are as they were written", False
  return f"changed since {folder} was written: {listing(changed)}", True


def _weights(base: str, about: Mapping[str, Any]) -> tuple[str, bool]:
  full = provenance.full(registry.stored(resolve(base)))
  differ = provenance.compare(about, full)
  count = len(about["base"]["weights"])
  parts = [
    f"{listing(keys, 8)} ({len(keys)} of {count}) {what}"
    for keys, what in (
      (differ.numbers, "of other numbers"),
      (differ.dtypes, "in another dtype"),
      (differ.absent, "missing"),
    )
    if keys
  ]
  if not parts:
    return f"the base's {count} weights are those that it was trained on", False
  return f"{base} is another base than it was trained on: {'; '.join(parts)}", True


def _logits(base: str, folder: Path, about: Mapping[str, Any]) -> tuple[str, bool]:
  options = {name: about["base"].get(name) for name in ("quant", "param_dtype")}
  try:
    loaded, saved = with_adapter.load(base, folder, other_base=True, **options)
    got = np.asarray(receipt.probed(loaded)(loaded.params, saved.adapter))
  except LoraxError as error:
    return f"its logits can't be computed: {error}", True
  probe = about["probe"]
  if list(got.shape) != probe.get("shape"):
    return f"its logits have shape {got.shape}, and had {probe.get('shape')}", True
  expected = np.asarray(probe["logits"], np.float32)
  largest = np.abs(expected).max()
  difference = np.abs(_chosen(got) - expected).max()
  line = f"logits of the probe differ by up to {difference:.3g} of {largest:.3g}"
  return line, not difference <= TOLERANCE * largest


def _records(folder: Path) -> dict[str, dict[str, Any]]:
  """The records of all weights of a base, with both digests."""
  found = registry.stored(folder)
  full, sampled = provenance.full(found), provenance.sampled(found)
  return {key: {**full[key], **sampled[key]} for key in full}


def _brought(base: registry.Loaded, adapter: Adapter) -> set[str]:
  """Bare keys of the weights whose values in the base don't matter."""
  tuned = {path: delta for path, delta in adapter.items() if isinstance(delta, Tuned)}
  return {
    bare
    for bare, site in base.keymap.sites.items()
    if site.path in tuned and has_layer(tuned[site.path], site.index)
  }


def _plan(delta: Delta) -> dict[str, Any]:
  stored = {n: x for n, x in delta.leaves().items() if n not in delta.from_base}
  return {
    "method": METHODS.name_of(delta),
    "rank": delta.rank,
    "scale": np.asarray(getattr(delta, "scale", 1.0)).tolist(),
    "arrays": {name: list(x.shape) for name, x in stored.items()},
  }


def _chosen(logits: Any) -> np.ndarray:
  """Logits at equal distances, at most 256."""
  flat = np.asarray(logits, np.float32).reshape(-1)
  return flat[:: -(-flat.size // _LOGITS)]


def _versions() -> dict[str, str]:
  found = {name: importlib.metadata.version(name) for name in _LIBRARIES}
  return {"lorax_flax": __version__, **found}

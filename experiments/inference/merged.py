"""A base with an adapter merged into it, for `predict` and its like."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lorax_flax as lx
from lorax_flax.adapt.merge import without_place
from lorax_flax.errors import LoraxError, listing
from lorax_flax.hub.checkpoints import export
from lorax_flax.hub.resolve import resolve
from lorax_flax.jobs import compile_cache
from lorax_flax.methods import Adapter, Followed, Tuned
from lorax_flax.models import hf_config as fields
from lorax_flax.models import registry, with_adapter

# (params, deltas) -> those deltas that are not merged.
_Kept = Callable[[Any, Adapter], Adapter]


@dataclass(frozen=True)
class Merged:
  """A model with its adapter merged in.

  Attributes:
    loaded: the model; its params are the merged ones, its hf_config names the outputs.
    rest: deltas that are applied beside the base, in the transform, which a quantised
      base needs even with none; None: the model runs as it is.
  """

  loaded: registry.Loaded
  rest: Adapter | None = None

  @property
  def labels(self) -> tuple[str, ...] | None:
    """Names of the outputs, LABEL_0, … where unnamed; None where a vocabulary."""
    if not self.loaded.family.has_labels:
      return None
    names = self.loaded.hf_config.get("id2label") or {}
    count = self.loaded.config.num_labels
    return tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(count))

  @property
  def problem_type(self) -> str | None:
    """transformers' problem_type, by the number of outputs where none is named."""
    if self.labels is None:
      return None
    by_count = "regression" if len(self.labels) == 1 else "single_label_classification"
    return self.loaded.hf_config.get("problem_type") or by_count


def load(
  base: str, adapter: str | None, quant: str | None = None, other_base: bool = False
) -> Merged:
  """Loads a base by folder, alias or hub name, and merges an adapter into it.

  Deltas that have no place in the base are kept beside it.

  Args:
    quant: a format for the base's kernels in memory, beside which the deltas are kept.
    other_base: as of `with_adapter.load`.

  Raises:
    LoraxError: besides what the readers raise, weights that neither of the two has.
  """
  kept = _followed if quant else without_place
  return _loaded(base, adapter, kept, quant, other_base)


def headed(
  base: str, adapter: str | None, quant: str | None = None, other_base: bool = False
) -> Merged:
  """`load` that merges what was trained in full alone, and keeps the other deltas."""
  return _loaded(base, adapter, _followed, quant, other_base)


def _followed(params: Any, deltas: Adapter) -> Adapter:
  """The deltas that the transform applies."""
  return {path: each for path, each in deltas.items() if isinstance(each, Followed)}


def _loaded(
  base: str, adapter: str | None, kept: _Kept, quant: str | None, other_base: bool
) -> Merged:
  """A base with an adapter merged in, but for the deltas that are kept."""
  loaded, deltas = read(base, adapter, quant, other_base)
  rest = kept(loaded.params, deltas)
  deltas = {path: delta for path, delta in deltas.items() if path not in rest}
  loaded = dataclasses.replace(loaded, params=lx.merge(loaded.params, deltas))
  return Merged(loaded, rest if rest or quant is not None else None)


def read(
  base: str,
  adapter: str | None,
  quant: str | None = None,
  other_base: bool = False,
  deferred: bool = False,
) -> tuple[registry.Loaded, Adapter]:
  """A base with the outputs' names of an adapter, and the adapter.

  Args:
    quant, other_base, deferred: as of `with_adapter.load`.

  Raises:
    LoraxError: as of `load`.
  """
  compile_cache.use(None)
  deltas: Adapter = {}
  own, problem_type = None, None
  if adapter is None:
    loaded = registry.load(resolve(base), quant=quant, deferred=deferred)
  else:
    loaded, saved = with_adapter.load(
      base, adapter, quant=quant, other_base=other_base, deferred=deferred
    )
    deltas, own, problem_type = saved.adapter, saved.labels, saved.problem_type
  brought = {path for path, delta in deltas.items() if isinstance(delta, Tuned)}
  if absent := set(loaded.new_paths) - brought:
    hint = f"nor does the adapter {adapter}" if adapter else "and no adapter is given"
    raise LoraxError(
      f"the base {base} has no {listing(absent, most=4)}, {hint}: its outputs would be "
      "random numbers. Give an adapter trained on this base with its head (--adapter), "
      "or a base that has one"
    )
  if adapter and loaded.family.has_labels:
    hf_config = _with_labels(loaded, adapter, own, problem_type)
    loaded = dataclasses.replace(loaded, hf_config=hf_config)
  return loaded, deltas


def _with_labels(
  loaded: registry.Loaded,
  adapter: str,
  own: Sequence[str] | None,
  problem_type: str | None,
) -> Mapping[str, Any]:
  """The config.json with the names that the adapter has; or else the base's, as PEFT
  keeps them, unless the adapter's head has another number of outputs."""
  count, hf_config = loaded.config.num_labels, loaded.hf_config
  if own is not None:
    if len(own) != count:
      raise LoraxError(f"{adapter} names {len(own)} labels, and its head has {count}")
    return export.with_head(hf_config, own, problem_type)
  if fields.labels_in(hf_config) in (None, count):
    return hf_config
  names = [f"LABEL_{i}" for i in range(count)]
  return export.with_head(hf_config, names, hf_config.get("problem_type"))

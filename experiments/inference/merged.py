"""A base with an adapter merged into it: what `merge` writes and `predict` runs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lorax_flax as lx
from lorax_flax.adapt.merge import without_place
from lorax_flax.errors import LoraxError, listing
from lorax_flax.hub.resolve import resolve
from lorax_flax.methods import Adapter, Tuned
from lorax_flax.models import registry, with_adapter


@dataclass(frozen=True)
class Merged:
  """A model with its adapter merged in.

  Attributes:
    loaded: the model; its params are the merged ones.
    labels: names of the outputs, LABEL_0, … where nobody named them; None where they
      are a vocabulary.
    folder: of the base, with its tokenizer.
    rest: deltas that can't be merged, which are applied beside the base.
  """

  loaded: registry.Loaded
  labels: tuple[str, ...] | None
  folder: Path
  rest: Adapter = dataclasses.field(default_factory=dict)

  @property
  def regression(self) -> bool:
    """True where the one output is a number."""
    return self.labels is not None and len(self.labels) == 1


def load(base: str, adapter: str | None, *, apply: bool = False) -> Merged:
  """Loads a base by folder, alias or hub name, and merges an adapter into it.

  Args:
    apply: keep the deltas that have no place in the base; otherwise an error.

  Raises:
    LoraxError: besides what the readers raise, weights that neither of the two has.
  """
  brought: set[str] = set()
  rest: Adapter = {}
  own = None
  if adapter is None:
    loaded = registry.load(resolve(base))
  else:
    loaded, saved = with_adapter.load(base, adapter)
    deltas, own = saved.adapter, saved.labels
    brought = {path for path, delta in deltas.items() if isinstance(delta, Tuned)}
    rest = without_place(loaded.params, deltas) if apply else {}
    deltas = {path: delta for path, delta in deltas.items() if path not in rest}
    loaded = dataclasses.replace(loaded, params=lx.merge(loaded.params, deltas))
  if absent := set(loaded.new_paths) - brought:
    hint = f"nor does the adapter {adapter}" if adapter else "and no adapter is given"
    raise LoraxError(
      f"the base {base} has no {listing(absent, most=4)}, {hint}: its outputs would be "
      "random numbers. Give an adapter trained on this base with its head (--adapter), "
      "or a base that has one"
    )
  has_labels = loaded.family.has_labels
  labels = _labels(loaded, adapter, own) if has_labels else None
  return Merged(loaded, labels, loaded.folder, rest)


def _labels(
  loaded: registry.Loaded, adapter: str | None, own: Sequence[str] | None
) -> tuple[str, ...]:
  count = loaded.config.num_labels
  names = loaded.hf_config.get("id2label") or {}
  # An adapter's head has outputs of its own: the base's names are not theirs.
  if own is None and not adapter:
    own = [str(names.get(str(i), f"LABEL_{i}")) for i in range(count)]
  if own is None:
    own = [f"LABEL_{i}" for i in range(count)]
  if len(own) != count:
    raise LoraxError(f"{adapter} names {len(own)} labels, and its head has {count}")
  return tuple(own)

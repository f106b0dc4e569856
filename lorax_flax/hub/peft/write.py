"""An adapter as a PEFT folder: its config, and its tensors."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from lorax_flax.adapt import stacking
from lorax_flax.adapt.config import LoraConfig
from lorax_flax.errors import LoraxError, listing, unknown
from lorax_flax.hub.checkpoints.entries import Site
from lorax_flax.hub.checkpoints.keymap import KeyMap, module_of
from lorax_flax.hub.peft import config as peft_config
from lorax_flax.hub.peft import pruned, soft
from lorax_flax.hub.peft.config import PeftConfig
from lorax_flax.hub.peft.forms import ROLES, fields_of
from lorax_flax.hub.peft.layout import Slot, Targets, resolve
from lorax_flax.hub.peft.modules import (
  ADAPTABLE,
  Place,
  input_embedding,
  module_names,
  parameters,
  places,
  tensors,
  tied_to,
)
from lorax_flax.hub.peft.names import shortest_ends
from lorax_flax.methods import Adapter, Delta, KernelDelta, Rows, Tuned
from lorax_flax.methods.peft_form import PeftForm


@dataclass(frozen=True)
class _Factored:
  """A module or parameter with factors, as PEFT's patterns speak of it."""

  rank: int
  scale: np.float32
  place: Place


def to_peft_config(
  adapter: Adapter,
  keymap: KeyMap,
  config: LoraConfig,
  *,
  base_name: str | None = None,
  revision: str | None = None,
  task_type: str | None = peft_config.SEQ_CLS,
) -> PeftConfig:
  """PEFT's config of an adapter: targets, ranks and scales are the adapter's own.

  Args:
    adapter: its deltas say what is targeted, with which rank and scale.
    keymap: of the base.
    config: what else there is to say (bias, init), and the alphas as they were given.
    base_name, revision, task_type: as PEFT's fields.

  Raises:
    LoraxError: a delta or a tuned leaf that PEFT has no form for.
  """
  if (soft_form := soft.of_adapter(adapter, keymap)) is not None:
    rest = {path: d for path, d in adapter.items() if path != soft_form.path}
    whole = _saved_modules(rest, keymap, config)
    result = PeftConfig(
      r=None,
      lora_alpha=None,
      peft_type=soft_form.peft.type,
      options=soft_form.options(adapter[soft_form.path].leaves()["value"].shape),
      modules_to_save=tuple(whole) or None,
      task_type=task_type,
      base_model_name_or_path=base_name,
      revision=revision,
    )
    is_classifier = task_type == peft_config.SEQ_CLS
    return _with_head(result, whole, (), keymap) if is_classifier else result
  found = places(keymap)
  whole = _saved_modules(adapter, keymap, config)
  if not any(isinstance(delta, KernelDelta) for delta in adapter.values()):
    base = {"base_model_name_or_path": base_name, "revision": revision}
    return _alone(adapter, keymap, found, whole, {**base, "task_type": task_type})
  factored = _factored(adapter, keymap, found)
  modules = {n: f for n, f in factored.items() if n in found}
  raw = [name for name in factored if name not in found]
  others = [key for key in parameters(keymap) if key not in raw]
  shared = [tied for name in modules for tied in tied_to(found, name)]
  ties_saved = [name for name in whole if tied_to(found, name)]
  saved = [_known_to_tie(name, found) if name in ties_saved else name for name in whole]
  form = _form(adapter)
  flag, known = form.flag, {ours for ours, _ in fields_of(form).values()}
  patterns: dict[str, Any] = {"r": None, "lora_alpha": None}
  if "r" in known:
    ranks = {n: f.rank for n, f in factored.items()}
    patterns |= _patterns("r", "rank_pattern", ranks)
  if "lora_alpha" in known:
    alphas = {n: _alpha(f.scale, f.rank, config) for n, f in factored.items()}
    patterns |= _patterns("lora_alpha", "alpha_pattern", alphas)
  selections = _selections(adapter, modules, form, keymap)
  sites = {n: (adapter[f.place.site.path], f.place.site) for n, f in modules.items()}
  result = PeftConfig(
    peft_type=form.type,
    options=_options(adapter, config, form) | selections,
    kept_ranks=pruned.kept_ranks(sites, form.pruned_by) if form.pruned_by else {},
    **patterns,
    lora_dropout=_dropout(adapter),
    modules_to_save=tuple(saved) or None,
    trainable_token_indices=_tokens(adapter, found),
    ensure_weight_tying=bool(shared or ties_saved),
    bias=config.bias,
    use_rslora=config.use_rslora,
    fan_in_fan_out=_is_conv1d(modules),
    init_lora_weights=True if config.init == "uniform" else config.init,
    task_type=task_type,
    base_model_name_or_path=base_name,
    revision=revision,
  )
  flags: dict[str, Any] = {flag: True} if flag else {}
  result = replace(result, **flags)
  if task_type == peft_config.SEQ_CLS:
    result = _with_head(result, saved, factored, keymap)
  # PEFT wants what other fields name among the targets, in the same words.
  names = [*_names(modules, found, result, keymap), *chain(*selections.values())]
  result = replace(
    result,
    target_modules=tuple(dict.fromkeys(names)),
    target_parameters=tuple(shortest_ends(raw, others)) or None,
  )
  _check(result, factored, resolve(result, keymap, found))
  return result


def _alone(
  adapter: Adapter,
  keymap: KeyMap,
  found: Mapping[str, Place],
  whole: Sequence[str],
  names: Mapping[str, Any],
) -> PeftConfig:
  """The config of an adapter in which no kernel has a delta: trained rows, or norms.

  Args:
    whole: the modules trained in full.
    names: of the base and of the task.
  """
  tables = {p: d.indices for p, d in adapter.items() if isinstance(d, Rows)}
  modules = [
    name
    for name, place in found.items()
    if (place.site.path in tables and place.main is None)
    or (not tables and place.kind == "norm" and name in whole)
  ]
  if len({*tables.values()}) > 1 or not modules:
    raise LoraxError(
      "PEFT's LoRA folder needs one low-rank delta at least; none here. PEFT has types "
      "of their own for the same rows of each table, and for norms trained in full"
    )
  method: type[Delta] = Rows if tables else Tuned
  form = method.alone or PeftForm()
  saved = [name for name in whole if name not in modules]
  others = [name for name in module_names(keymap) if name not in modules]
  result = PeftConfig(
    peft_type=form.type,
    r=None,
    lora_alpha=None,
    target_modules=tuple(shortest_ends(modules, others)),
    modules_to_save=tuple(saved) or None,
    trainable_token_indices=next(iter(tables.values()), None),
    **names,
  )
  if result.task_type == peft_config.SEQ_CLS and "modules_to_save" not in form.lacks:
    result = _with_head(result, saved, modules, keymap)
  assert {*resolve(result, keymap, found).modules} == {*modules}
  return result


def to_tensors(
  adapter: Adapter,
  slots: Mapping[str, Slot],
  config: PeftConfig,
  leaves: Mapping[str, Any],
) -> dict[str, np.ndarray]:
  """The tensors of a folder, float32, each as its slot says.

  Args:
    leaves: of the base, for what PEFT repeats of it.

  Raises:
    LoraxError: a tensor that the adapter doesn't hold, or a leaf that has no tensor.
  """
  if rest := adapter.keys() - {slot.path for slot in slots.values()}:
    raise LoraxError(
      f"PEFT's bias={config.bias!r} does not save what the adapter trains: "
      f"{listing(rest, most=4)}. Give LoraConfig.bias='all' for every bias, "
      "'lora_only' for those of the targets, or tune whole modules"
    )
  tensors = {}
  for key, slot in slots.items():
    if slot.method is None and slot.path not in leaves:
      raise LoraxError(f"{key} is the base's own {slot.path}: give params")
    delta = adapter.get(slot.path)
    absent = delta is None or not stacking.has_layer(delta, slot.site.index)
    if slot.method is not None and absent:
      raise LoraxError(
        f"PEFT's folder for bias={config.bias!r} needs {key}, and the adapter does not "
        f"train {slot.path}"
      )
    tensors[key] = np.ascontiguousarray(part_of(slot, config, adapter, leaves))
  return tensors


def part_of(
  slot: Slot, config: PeftConfig, adapter: Adapter, leaves: Mapping[str, Any]
) -> np.ndarray:
  """The tensor of a slot, as it is stored; float32."""
  if slot.method is None:
    return slot.form.to_stored(_at(leaves[slot.path], slot.site))
  if slot.status == "shared":
    return slot.form.to_stored(_shared(slot.leaf, adapter))
  delta = adapter[slot.path]
  leaf, site = delta.leaves()[slot.leaf], slot.site
  if slot.leaf not in delta.from_base:
    site = replace(site, index=stacking.place_of(delta, site.index))
  if not isinstance(delta, KernelDelta):
    return slot.form.to_stored(_at(leaf, site))
  axes = delta.leaf_axes(slot.leaf)[len(site.index) :]
  value = stacking.numbers(leaf)[site.index]
  return slot.form.to_stored(stacking.trimmed(value, axes, config.rank(slot.module)))


def _shared(leaf: str, adapter: Adapter) -> np.ndarray:
  """The tensor of which each delta's leaf is the first part."""
  deltas = {p: d for p, d in adapter.items() if isinstance(d, KernelDelta)}
  parts = {path: np.asarray(d.leaves()[leaf], np.float32) for path, d in deltas.items()}
  full = np.zeros(np.max([x.shape for x in parts.values()], axis=0), np.float32)
  for x in parts.values():
    full[tuple(map(slice, x.shape))] = x
  for path, x in parts.items():
    if not np.array_equal(full[tuple(map(slice, x.shape))], x):
      raise LoraxError(
        f"PEFT has one {leaf} for all targets, and that of {path} differs"
      )
  return full


def _at(leaf: Any, site: Site) -> np.ndarray:
  value = np.asarray(leaf, np.float32)
  return value[site.place(value.shape)]


def _factored(
  adapter: Adapter, keymap: KeyMap, found: Mapping[str, Place]
) -> dict[str, _Factored]:
  """The modules and the parameters with factors, layers one by one."""
  by_path: dict[str, dict[str, Place]] = {}
  for name, place in found.items():
    if place.kind in ADAPTABLE and place.main is None:
      by_path.setdefault(place.site.path, {})[name] = place
  modules = {place.site.path for place in found.values() if place.kind in ADAPTABLE}
  for key, place in parameters(keymap).items():
    if place.site.path not in modules:
      by_path.setdefault(place.site.path, {})[key] = place
  result = {}
  for path, delta in adapter.items():
    if not isinstance(delta, KernelDelta):
      continue
    if delta.peft is None:
      raise LoraxError(
        f"PEFT has no form for {type(delta).__name__}, which {path} has: write the "
        "adapter in our own form, or merge it (experiments.merge)"
      )
    if path not in by_path:
      raise LoraxError(
        f"PEFT has no LoRA for {path}: neither a linear layer's kernel nor an "
        "embedding, a convolution or a stack of experts"
      )
    for name, place in by_path[path].items():
      _check_roles(path, delta, place)
      if stacking.has_layer(delta, place.site.index):
        result[name] = _one(delta, place)
  if not result:
    raise LoraxError("PEFT's LoRA folder needs one low-rank delta at least; none here")
  return result


def _check_roles(path: str, delta: KernelDelta, place: Place) -> None:
  roles = ("stack",) * len(place.site.index) + ROLES[place.kind]
  if delta.roles != roles:
    raise LoraxError(
      f"PEFT's LoRA for {path} takes its axes for {' '.join(roles)}, and the adapter's "
      f"delta for {' '.join(delta.roles)}"
    )


def _one(delta: KernelDelta, place: Place) -> _Factored:
  """A delta at one place of its stack."""
  _, scale, rank = stacking.unstack(delta, place.site.index)
  if scale.ndim and (scale != scale.flat[0]).any():
    raise LoraxError(f"PEFT has one scale for all experts of {place.site.path}")
  return _Factored(rank, np.float32(scale.flat[0]), place)


def _form(adapter: Adapter) -> PeftForm:
  """The form of the targets' method, which in PEFT is the same for all."""
  kinds = {type(delta) for delta in adapter.values() if isinstance(delta, KernelDelta)}
  if len(kinds) > 1:
    names = listing(kind.__name__ for kind in kinds)
    raise LoraxError(f"PEFT has one method for all targets, and here are {names}")
  return kinds.pop().peft or PeftForm()


def _options(adapter: Adapter, config: LoraConfig, form: PeftForm) -> dict[str, Any]:
  """The method's options that PEFT has fields for: the deltas' own, or the config's."""
  deltas = [delta for delta in adapter.values() if isinstance(delta, KernelDelta)]
  given = {**deltas[0].options, **config.options}
  found = {}
  for name in form.options.values() - form.selected.keys():
    values = {getattr(delta, name, given[name]) for delta in deltas}
    if len(values) > 1:
      raise LoraxError(f"PEFT has one {name} for all targets, not {sorted(values)}")
    (found[name],) = values
  return found


def _selections(
  adapter: Adapter, modules: Mapping[str, _Factored], form: PeftForm, keymap: KeyMap
) -> dict[str, tuple[str, ...]]:
  """The options that name modules: the shortest ends that mean these alone."""
  found = {}
  for option in form.selected:
    chosen = [
      n for n, f in modules.items() if getattr(adapter[f.place.site.path], option)
    ]
    others = [name for name in module_names(keymap) if name not in chosen]
    found[option] = tuple(shortest_ends(chosen, others))
  return found


def _tokens(
  adapter: Adapter, found: Mapping[str, Place]
) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
  """trainable_token_indices: a list where the input embedding's are meant."""
  tables = {path: delta for path, delta in adapter.items() if isinstance(delta, Rows)}
  rows = {
    name: tables[place.site.path].indices
    for name, place in found.items()
    if place.main is None and place.site.path in tables
  }
  if left := tables.keys() - {found[name].site.path for name in rows}:
    raise LoraxError(f"PEFT trains rows of modules' weights, not of {listing(left)}")
  if not rows:
    return None
  if rows.keys() == {input_embedding(found)}:
    return next(iter(rows.values()))
  return rows


def _is_conv1d(modules: Mapping[str, _Factored]) -> bool:
  """PEFT's fan_in_fan_out: whether the last target's kernel is stored as (in, out).

  PEFT turns it to what each target needs, one after another, whatever it is.
  """
  linear = [f.place for f in modules.values() if f.place.kind == "linear"]
  return bool(linear) and linear[-1].site.entry.axes is None


def _dropout(adapter: Adapter) -> float:
  rates = {
    delta.dropout for delta in adapter.values() if isinstance(delta, KernelDelta)
  }
  if len(rates) > 1:
    raise LoraxError(f"PEFT has one dropout rate for all targets, not {sorted(rates)}")
  return rates.pop()


def _alpha(scale: np.float32, rank: int, config: LoraConfig) -> float:
  """The alpha that PEFT makes this scale of; as it was given, where it was."""
  if not scale > 0:
    raise LoraxError(f"PEFT's alpha is positive, and a delta here has scale {scale}")
  divisor = math.sqrt(rank) if config.use_rslora else rank
  given = [config.alpha]
  for value in config.alpha_pattern.values():
    given += value if isinstance(value, Sequence) else [value]
  for alpha in given:
    if np.float32(alpha / divisor) == scale:
      return _plain(alpha)
  return _plain(float(scale) * divisor)


def _plain(alpha: float) -> float:
  return int(alpha) if float(alpha).is_integer() else float(alpha)


def _patterns(name: str, pattern: str, values: Mapping[str, Any]) -> dict[str, Any]:
  """The most common value, and PEFT's patterns for the modules that differ."""
  default = stacking.most_common(values)
  patterns: dict[str, Any] = {}
  for value in dict.fromkeys(values.values()):
    if value == default:
      continue
    chosen = [name for name in values if values[name] == value]
    others = [name for name in values if values[name] != value]
    patterns |= dict.fromkeys(shortest_ends(chosen, others), value)
  return {name: default, pattern: patterns}


def _names(
  modules: Mapping[str, _Factored],
  found: Mapping[str, Place],
  config: PeftConfig,
  keymap: KeyMap,
) -> list[str]:
  """target_modules: the shortest ends of names that mean the targets alone."""
  shared = {tied for name in modules for tied in tied_to(found, name)}
  mains = [name for name in modules if tied_to(found, name)]
  others = [
    name
    for name in module_names(keymap)
    if name not in modules and name not in shared and not config.is_excluded(name)
  ]
  ends = shortest_ends([name for name in modules if name not in mains], others)
  # In full, since the bare "embed_tokens" makes PEFT save the base's weight too.
  return [*ends, *(_known_to_tie(main, found) for main in mains)]


def _known_to_tie(main: str, found: Mapping[str, Place]) -> str:
  """The name by which PEFT sees that an embedding is meant; it knows two."""
  known = main.rpartition(".")[2] in peft_config.EMBEDDING_NAMES
  return main if known else tied_to(found, main)[0]


def _saved_modules(adapter: Adapter, keymap: KeyMap, config: LoraConfig) -> list[str]:
  """The modules trained in full, the outermost whose every leaf is."""
  keys = tensors(keymap)
  paths = {path: delta for path, delta in adapter.items() if isinstance(delta, Tuned)}
  for path in paths.keys() - {site.path for site in keys.values()}:
    raise LoraxError(unknown(f"{keymap.family} parameter", path, keymap.keys))
  tuned = {
    key
    for key, site in keys.items()
    if site.path in paths and stacking.has_layer(paths[site.path], site.index)
  }
  inside = {
    name: leaves
    for name in module_names(keymap)
    if (leaves := {key for key in keys if key.startswith(f"{name}.")})
  }
  whole = [name for name, leaves in inside.items() if leaves <= tuned]
  outermost = [n for n in whole if not any(n.startswith(f"{o}.") for o in whole)]
  left = tuned - {key for name in outermost for key in inside[name]}
  if config.bias == "none" or any(not key.endswith(".bias") for key in left):
    for key in sorted(left):
      absent = inside.get(module_of(key), set()) - tuned
      raise LoraxError(
        f"PEFT saves whole modules, and the adapter trains {key} without "
        f"{listing(absent)}"
      )
  return outermost


def _with_head(
  config: PeftConfig, saved: list[str], factored: Iterable[str], keymap: KeyMap
) -> PeftConfig:
  """The config of a sequence classifier, whose head PEFT saves whether asked or not."""
  names = module_names(keymap)
  # PEFT takes every name that ends so: "pre_classifier" too.
  heads = [name for name in names if name.endswith(peft_config.HEAD_NAMES)]
  heads = [name for name in heads if module_of(name) not in heads]
  if wrapped := sorted(set(factored) & set(heads)):
    raise LoraxError(
      f"a {peft_config.SEQ_CLS} adapter in PEFT's form saves every module whose name "
      f"ends with {' or '.join(peft_config.HEAD_NAMES)} in full, and this one has "
      f"factors on {listing(wrapped)}: exclude it and add it to LoraConfig.tuned"
    )
  if absent := set(heads) - set(saved):
    raise LoraxError(
      f"a {peft_config.SEQ_CLS} adapter in PEFT's form brings its head, and this one "
      f"does not train the whole of {listing(absent)}: add it to LoraConfig.tuned, or "
      "give task_type=None"
    )
  rest = [name for name in saved if name not in heads]
  return replace(config, modules_to_save=tuple(peft_config.with_heads(rest)))


def _check(
  config: PeftConfig, factored: Mapping[str, _Factored], targets: Targets
) -> None:
  """Asserts that the config means the adapter: a slip here would be silent."""
  assert {*targets.modules, *targets.parameters} == factored.keys()
  for name, each in factored.items():
    assert config.rank(name) == each.rank, name
    assert np.float32(config.scale(name)) == each.scale, name

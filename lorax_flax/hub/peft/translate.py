"""PEFT's config in our words: paths for names of modules."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.hub.peft.config import PeftConfig
from lorax_flax.hub.peft.forms import alone, form_of, soft_form_of
from lorax_flax.hub.peft.layout import Slot, layout, resolve
from lorax_flax.hub.peft.modules import places
from lorax_flax.methods import METHODS, LoRA, Rows, Tuned


def to_lora_config(config: PeftConfig, keymap: KeyMap) -> LoraConfig:
  """The config that makes the adapter which a folder of `config` holds.

  Raises:
    LoraxError: as `layout`.
  """
  slots = [slot for slot in layout(config, keymap).values() if slot.status == "own"]
  if soft_form_of(config) is not None:
    return LoraConfig(targets=(), tuned=tuple(sorted({slot.path for slot in slots})))
  # Of the several tensors of a module, one.
  kernels = [s for s in slots if s.method not in (None, Rows, Tuned)]
  method = (kernels[0].method if kernels else None) or LoRA
  factors = [s for s in kernels if s.leaf == method.trained[0]]
  of_all: dict[str, Any] = {"rank": config.r, "alpha": config.lora_alpha}
  targets = resolve(config, keymap, places(keymap))
  whole = {*targets.saved, *(targets.modules if alone(config.peft_type) else ())}
  in_full = [s for s in slots if s.method is Tuned and s.module in whole]
  return LoraConfig(
    targets=tuple(dict.fromkeys(slot.path for slot in factors)),
    **{name: x for name, x in of_all.items() if x is not None},
    options=dict(config.options) | _selections(config, factors),
    rank_pattern=_pattern(factors, keymap, config.rank, config.r or 0, 0),
    alpha_pattern=_pattern(
      factors, keymap, config.alpha, config.lora_alpha, config.lora_alpha
    ),
    use_rslora=config.use_rslora,
    method=next(name for name, m in METHODS.items() if m is method),
    # LoraConfig.bias trains the other leaves.
    tuned=tuple(sorted({slot.path for slot in in_full})),
    tuned_layers=_tuned_layers(in_full, keymap),
    rows={slot.path: slot.rows for slot in slots if slot.method is Rows},
    bias=config.bias,
    dropout=config.lora_dropout,
    init=init if isinstance(init := config.init_lora_weights, str) else "uniform",
    stack_axes={
      re.escape(slot.path): (len(slot.site.index),)
      for slot in factors
      if slot.roles[0] == "stack"
    },
  )


def _selections(config: PeftConfig, factors: Iterable[Slot]) -> dict[str, Any]:
  """The options that name modules, by our paths."""
  selected = form_of(config.peft_type).selected
  return {
    name: tuple(
      dict.fromkeys(s.path for s in factors if config.selects(name, s.module))
    )
    for name in selected
  }


def _tuned_layers(saved: Iterable[Slot], keymap: KeyMap) -> dict[str, tuple[int, ...]]:
  """The layers of each stacked leaf that are saved, where not all of them are."""
  layers: dict[str, set[int]] = {}
  for slot in saved:
    if slot.site.index:
      layers.setdefault(slot.path, set()).add(slot.site.index[0])
  return {
    path: tuple(sorted(found))
    for path, found in layers.items()
    if len(found) < len(_indices(keymap, path))
  }


def _indices(keymap: KeyMap, path: str) -> list[int]:
  """The indices of a stacked leaf's layers."""
  return sorted({keymap.sites[key].index[0] for key in keymap.keys[path]})


def _pattern(
  factors: Iterable[Slot], keymap: KeyMap, value: Any, default: Any, absent: Any
) -> dict[str, Any]:
  """rank_pattern or alpha_pattern: one value for a path, or one for each layer of it.

  Args:
    value: (PEFT's name) -> value.
    default: that no pattern need say.
    absent: of a layer that has no factors.
  """
  by_path: dict[str, dict[tuple[int, ...], Any]] = {}
  for slot in factors:
    by_path.setdefault(slot.path, {})[slot.site.index] = value(slot.module)
  found = {p: _one_or_each(v, keymap, p, absent) for p, v in by_path.items()}
  return {re.escape(path): v for path, v in found.items() if v != default}


def _one_or_each(
  values: Mapping[tuple[int, ...], Any], keymap: KeyMap, path: str, absent: Any
) -> Any:
  if () in values:
    return values[()]
  layers = {index[0]: value for index, value in values.items()}
  each = tuple(layers.get(i, absent) for i in _indices(keymap, path))
  return each[0] if len(set(each)) == 1 else each

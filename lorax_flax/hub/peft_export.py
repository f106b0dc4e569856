"""From an adapter to PEFT's config and tensors."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.errors import LoraxError, listing
from lorax_flax.hub import peft_config
from lorax_flax.hub.keymap import KeyMap, full_key, module_of, modules, path_to_keys
from lorax_flax.hub.peft_config import PeftConfig, shortest_ends
from lorax_flax.hub.peft_layout import Slot, can_hold_factors, module_names, transposed
from lorax_flax.methods import Adapter, Delta, LoRA, Tuned


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
  ranks, scales = _factors(adapter, keymap)
  saved = _saved_modules(adapter, keymap, config)
  if task_type == peft_config.SEQ_CLS:
    saved = _with_head(saved, keymap)
  alphas = {name: _alpha(scales[name], rank, config) for name, rank in ranks.items()}
  (r, rank_pattern), (alpha, alpha_pattern) = _patterns(ranks), _patterns(alphas)
  result = PeftConfig(
    r=r,
    lora_alpha=alpha,
    lora_dropout=_dropout(adapter),
    modules_to_save=tuple(saved) or None,
    rank_pattern=rank_pattern,
    alpha_pattern=alpha_pattern,
    bias=config.bias,
    use_rslora=config.use_rslora,
    fan_in_fan_out=_is_conv1d(ranks, keymap),
    init_lora_weights="gaussian" if config.init == "gaussian" else True,
    task_type=task_type,
    base_model_name_or_path=base_name,
    revision=revision,
  )
  others = [
    name
    for name in module_names(keymap)
    if name not in ranks and not result.is_excluded(name)
  ]
  result = replace(result, target_modules=tuple(shortest_ends(ranks, others)))
  for name, rank in ranks.items():
    assert result.is_target(name), name
    assert result.rank(name) == rank, name
    assert np.float32(result.scale(name)) == scales[name], name
  return result


def to_tensors(
  adapter: Adapter, slots: Mapping[str, Slot], config: PeftConfig
) -> dict[str, np.ndarray]:
  """The tensors of a folder, float32, each as its slot says.

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
    if slot.path not in adapter:
      raise LoraxError(
        f"PEFT's folder for bias={config.bias!r} needs {key}, and the adapter does not "
        f"train {slot.path}"
      )
    value = _part(adapter[slot.path], slot)
    if slot.part in ("a", "b"):
      rank = config.rank(slot.module)
      value = value[..., :rank] if slot.part == "a" else value[:rank]
    tensors[key] = np.ascontiguousarray(value.T if slot.reverse else value)
  return tensors


def _part(delta: Delta, slot: Slot) -> np.ndarray:
  """One part of a delta, and of that one layer; float32."""
  if isinstance(delta, LoRA):
    value = np.asarray(delta.a if slot.part == "a" else delta.b, np.float32)
    layers = delta.layers
  elif not isinstance(delta, Tuned):
    raise LoraxError(f"{type(delta).__name__} of {slot.path} cannot be exported yet")
  else:
    leaf = delta.original if slot.part == "original" else delta.value
    value, layers = np.asarray(leaf, np.float32), None
  if slot.layer is None:
    return value
  return value[slot.layer if layers is None else layers.index(slot.layer)]


def _factors(
  adapter: Adapter, keymap: KeyMap
) -> tuple[dict[str, int], dict[str, np.float32]]:
  """The rank and the scale of each module with factors, layers one by one."""
  ranks: dict[str, int] = {}
  scales: dict[str, np.float32] = {}
  for path, delta in adapter.items():
    if not isinstance(delta, LoRA):
      continue
    names = [module_of(key) for key in path_to_keys(keymap, path)]
    if not can_hold_factors(keymap, names[0]) or path not in _weights(keymap):
      raise LoraxError(
        f"PEFT has no LoRA for {path}: neither a linear layer's kernel nor an embedding"
      )
    if not keymap.scan or "stack" not in delta.roles:
      ranks[names[0]], scales[names[0]] = delta.rank, np.float32(delta.scale)
      continue
    layers = range(len(names)) if delta.layers is None else delta.layers
    each = np.broadcast_to(np.asarray(delta.scale, np.float32), (len(layers),))
    a, b = np.asarray(delta.a), np.asarray(delta.b)
    for place, layer in enumerate(layers):
      ranks[names[layer]] = _own_rank(a[place], b[place])
      scales[names[layer]] = each[place]
  if not ranks:
    raise LoraxError("PEFT's LoRA folder needs one low-rank delta at least; none here")
  return ranks, scales


def _own_rank(a: np.ndarray, b: np.ndarray) -> int:
  """The rank less the zeros that pad a layer to its neighbours' rank."""
  used = np.flatnonzero(a.any(axis=0) | b.any(axis=1))
  return int(used[-1]) + 1 if len(used) else 1


def _weights(keymap: KeyMap) -> set[str]:
  return {keymap.sites[key].path for key in keymap.leaves.values()}


def _is_conv1d(targets: Mapping[str, Any], keymap: KeyMap) -> bool:
  """Whether kernels of the targets are stored as (in, out): PEFT's fan_in_fan_out."""
  kinds = modules(keymap)
  linear = (f"{name}.weight" for name in targets if kinds[name] == "linear")
  return any(not transposed(keymap, key) for key in linear)


def _dropout(adapter: Adapter) -> float:
  rates = {delta.dropout for delta in adapter.values() if isinstance(delta, LoRA)}
  if len(rates) > 1:
    raise LoraxError(f"PEFT has one dropout rate for all targets, not {sorted(rates)}")
  return rates.pop()


def _alpha(scale: np.float32, rank: int, config: LoraConfig) -> float:
  """The alpha that PEFT makes this scale of; as it was given, where it was."""
  if not scale > 0:
    raise LoraxError(f"PEFT's alpha is positive, and a delta here has scale {scale}")
  divisor = math.sqrt(rank) if config.use_rslora else rank
  for alpha in (config.alpha, *config.alpha_pattern.values()):
    if np.float32(alpha / divisor) == scale:
      return _plain(alpha)
  return _plain(float(scale) * divisor)


def _plain(alpha: float) -> float:
  return int(alpha) if float(alpha).is_integer() else float(alpha)


def _patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
  """The most common value, and PEFT's patterns for the modules that differ."""
  (default, _), *_ = Counter(values.values()).most_common(1)
  patterns: dict[str, Any] = {}
  for value in dict.fromkeys(values.values()):
    if value == default:
      continue
    wanted = [name for name in values if values[name] == value]
    others = [name for name in values if values[name] != value]
    patterns |= dict.fromkeys(shortest_ends(wanted, others), value)
  return default, patterns


def _saved_modules(adapter: Adapter, keymap: KeyMap, config: LoraConfig) -> list[str]:
  """The modules trained in full, the outermost whose every leaf is."""
  tuned = {
    key
    for path, delta in adapter.items()
    if isinstance(delta, Tuned)
    for key in path_to_keys(keymap, path)
  }
  keys = [full_key(keymap, bare) for bare in keymap.sites]
  inside = {
    name: {key for key in keys if key.startswith(f"{name}.")}
    for name in module_names(keymap)
  }
  whole = [name for name, leaves in inside.items() if leaves <= tuned]
  outermost = [n for n in whole if not any(n.startswith(f"{o}.") for o in whole)]
  left = tuned - {key for name in outermost for key in inside[name]}
  if config.bias == "none" or any(not key.endswith(".bias") for key in left):
    for key in sorted(left):
      absent = inside[module_of(key)] - tuned
      raise LoraxError(
        f"PEFT saves whole modules, and the adapter trains {key} without "
        f"{listing(absent)}"
      )
  return outermost


def _with_head(saved: list[str], keymap: KeyMap) -> list[str]:
  heads = set(peft_config.HEAD_NAMES) & set(module_names(keymap))
  if absent := heads - set(saved):
    raise LoraxError(
      f"a {peft_config.SEQ_CLS} adapter in PEFT's form brings its head, and this one "
      f"does not train the whole of {listing(absent)}: add it to LoraConfig.tuned, or "
      "give task_type=None"
    )
  return [*peft_config.with_heads([name for name in saved if name not in heads])]

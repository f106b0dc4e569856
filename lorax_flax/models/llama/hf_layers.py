"""Fields of a config.json that differ by layer: windows and rotary positions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorax_flax.errors import LoraxError
from lorax_flax.models import hf_config as fields
from lorax_flax.models.llama import hf_rope
from lorax_flax.models.llama.config import DecoderConfig
from lorax_flax.models.ops import Rope

HfConfig = Mapping[str, Any]
# For each layer, the number of positions that a query attends to; None: all.
Windows = tuple[int | None, ...]
# The kinds, and for each layer the index of its kind.
Ropes = tuple[tuple[Rope, ...], tuple[int, ...]]

FULL, SLIDING = "full_attention", "sliding_attention"


def _window(hf_config: HfConfig, default: int | None) -> int | None:
  window = hf_config.get("sliding_window", default)
  if window is not None:
    expected, good = "a positive integer or null", lambda x: x > 0
    fields.check("sliding_window", window, int, expected, good)
  return window


def _flag(hf_config: HfConfig, name: str) -> bool:
  value = hf_config.get(name)
  fields.check(
    name, False if value is None else value, bool, "true or false", lambda x: True
  )
  return bool(value)


def window_everywhere(default: int | None, *, switch: bool = False):
  """Windows of a family in which all layers have the same.

  Args:
    switch: config.json has a flag use_sliding_window.
  """

  def windows(hf_config: HfConfig, count: int) -> Windows:
    on = not switch or _flag(hf_config, "use_sliding_window")
    return (_window(hf_config, default) if on else None,) * count

  return windows


def windows_by_types(
  default: int | None,
  slides: Callable[[HfConfig, int], bool],
  *,
  switch: bool = False,
):
  """Windows of a family in which some layers have one, by `layer_types`.

  Args:
    slides: (config.json, layer) -> whether it has a window, without `layer_types`.
    switch: config.json has a flag use_sliding_window.
  """

  def windows(hf_config: HfConfig, count: int) -> Windows:
    on = not switch or _flag(hf_config, "use_sliding_window")
    window = _window(hf_config, default) if on else None
    types = hf_config.get("layer_types")
    if types is None:
      slide = [window is not None and slides(hf_config, i) for i in range(count)]
      return tuple(window if s else None for s in slide)
    return tuple(window if t == SLIDING else None for t in _types(types, count, window))

  return windows


def _types(types: Any, count: int, window: int | None) -> Sequence[str]:
  if not isinstance(types, list) or any(t not in (FULL, SLIDING) for t in types):
    raise LoraxError(
      f"config: layer_types must be a list of {FULL!r} and {SLIDING!r}, not {types!r}"
    )
  if len(types) != count:
    raise LoraxError(f"config: {len(types)} layer_types of {count} layers")
  if window is None and SLIDING in types:
    raise LoraxError(f"config: a layer of {SLIDING!r} without a sliding_window")
  return types


def _number(hf_config: HfConfig, name: str, default: int) -> int:
  value = hf_config.get(name)
  value = default if value is None else value
  fields.check(name, value, int, "an integer from 0 on", lambda x: x >= 0)
  return value


def late_layers(hf_config: HfConfig, layer: int) -> bool:
  return layer >= _number(hf_config, "max_window_layers", 28)


def all_but_each(default: int):
  """All layers have a window but each n-th, n being `sliding_window_pattern`."""

  def slides(hf_config: HfConfig, layer: int) -> bool:
    pattern = _number(hf_config, "sliding_window_pattern", default)
    return pattern == 0 or (layer + 1) % pattern != 0

  return slides


def one_rope(hf_config: HfConfig, config: DecoderConfig, theta: float) -> Ropes:
  rope = hf_rope.read(
    hf_rope.given(hf_config),
    hf_config,
    max_position_embeddings=config.max_position_embeddings,
    theta=theta,
  )
  return (rope,), (0,) * config.num_hidden_layers


def gemma3_ropes(hf_config: HfConfig, config: DecoderConfig, theta: float) -> Ropes:
  """Layers with a window have another base, and no scaling."""
  given = hf_config.get("rope_parameters") or {}
  scaling = hf_config.get("rope_scaling")
  if scaling is not None:
    given = {FULL: scaling}
  if not isinstance(given, Mapping) or set(given) - {FULL, SLIDING}:
    raise LoraxError(
      f"config: rope_parameters of a {config.model_type} must be an object of"
      f" {FULL!r} and {SLIDING!r}, not {given!r}"
    )
  ropes = tuple(
    hf_rope.read(
      given.get(kind) or {},
      hf_config,
      max_position_embeddings=config.max_position_embeddings,
      theta=base,
      theta_name=name,
    )
    for kind, name, base in (
      (FULL, "rope_theta", theta),
      (SLIDING, "rope_local_base_freq", 10000.0),
    )
  )
  return ropes, tuple(int(window is not None) for window in config.windows)


def phi3_rope(hf_config: HfConfig, config: DecoderConfig, theta: float) -> Ropes:
  """Old names of LongRoPE, and a default of the length before scaling."""
  given = dict(hf_rope.given(hf_config))
  if (given.get("rope_type") or given.get("type")) in ("su", "yarn"):
    given["rope_type"] = "longrope"
  original = hf_config.get("original_max_position_embeddings") or 4096
  hf_config = {
    **hf_config,
    "rope_scaling": given,
    "original_max_position_embeddings": original,
  }
  return one_rope(hf_config, config, theta)


def _smollm3_rotary(hf_config: HfConfig, count: int) -> list[int]:
  """A flag per layer: 1 with rotary positions, 0 without."""
  given = hf_config.get("no_rope_layers")
  if given is None:
    every = _number(hf_config, "no_rope_layer_interval", 4)
    return [int(every == 0 or (i + 1) % every != 0) for i in range(count)]
  if not isinstance(given, list) or any(x not in (0, 1) for x in given):
    raise LoraxError(f"config: no_rope_layers must be a list of 0 and 1, not {given!r}")
  if len(given) < count:
    raise LoraxError(f"config: {len(given)} no_rope_layers of {count} layers")
  return given[:count]


def smollm3_ropes(hf_config: HfConfig, config: DecoderConfig, theta: float) -> Ropes:
  (rope,), _ = one_rope(hf_config, config, theta)
  rotary = _smollm3_rotary(hf_config, config.num_hidden_layers)
  if all(rotary):
    return (rope,), (0,) * len(rotary)
  return (rope, Rope("none")), tuple(1 - each for each in rotary)


def smollm3_slides(hf_config: HfConfig, layer: int) -> bool:
  return not _smollm3_rotary(hf_config, layer + 1)[layer]

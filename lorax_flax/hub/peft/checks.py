"""Checks of the fields of PEFT's LoraConfig: the values that PEFT writes."""

import sys
from collections.abc import Callable, Mapping
from typing import Any


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  # NaN is not; an int has no largest.
  return (_is_int(value) or isinstance(value, float)) and (
    abs(value) <= sys.float_info.max
  )


def _is_bool(value: Any) -> bool:
  return isinstance(value, bool)


def _is_str(value: Any) -> bool:
  return isinstance(value, str)


def _or_none(test):
  return lambda value: value is None or test(value)


def _each(test):
  return lambda value: isinstance(value, tuple) and all(map(test, value))


def _either(*tests):
  return lambda value: any(test(value) for test in tests)


def _values(test):
  return lambda value: (
    isinstance(value, Mapping)
    and all(map(_is_str, value))
    and all(map(test, value.values()))
  )


def _is_rank(value: Any) -> bool:
  return _is_int(value) and 0 < value <= 1 << 20


# These ways to start leave the base as it is.
_INITS = ("gaussian", "eva", "orthogonal", "mica")
# These change it, and such an adapter only means something beside the changed base.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def changes_the_base(init: Any) -> bool:
  """Checks whether this init_lora_weights takes its start out of the base's weights."""
  return _is_str(init) and init.lower().startswith(_CHANGE_THE_BASE)


def _is_index(value: Any) -> bool:
  return _is_int(value) and value >= 0


def _are_rows(value: Any) -> bool:
  return _each(_is_index)(value) and 0 < len(value) == len(set(value))


KINDS: Mapping[str, Callable[[Any], bool]] = {
  "r": _is_rank,
  "lora_alpha": _is_number,
  "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
  "target_modules": _or_none(_either(_is_str, _each(_is_str))),
  "exclude_modules": _or_none(_either(_is_str, _each(_is_str))),
  "modules_to_save": _or_none(_each(_is_str)),
  "layers_to_transform": _or_none(_either(_is_int, _each(_is_int))),
  "layers_pattern": _or_none(_either(_is_str, _each(_is_str))),
  "rank_pattern": _values(_is_rank),
  "alpha_pattern": _values(_is_number),
  "bias": lambda value: value in ("none", "all", "lora_only"),
  "use_rslora": _is_bool,
  "fan_in_fan_out": _is_bool,
  "use_dora": _is_bool,
  "lora_bias": _is_bool,
  "target_parameters": _or_none(_each(_is_str)),
  "trainable_token_indices": _or_none(_either(_are_rows, _values(_are_rows))),
  "ensure_weight_tying": _is_bool,
  "init_lora_weights": lambda value: _is_bool(value) or value in _INITS,
  "task_type": _or_none(_is_str),
  "base_model_name_or_path": _or_none(_is_str),
  "revision": _or_none(_is_str),
}

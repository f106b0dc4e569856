"""Rotary positions in a config.json, in its old format and its new one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lorax_flax.errors import LoraxError, unknown
from lorax_flax.models import hf_config as fields
from lorax_flax.models.ops import Rope

_NAMES = tuple(
  field.name
  for field in dataclasses.fields(Rope)
  if field.name != "max_position_embeddings"
)
# Another name of the type; a record without effect.
_OTHER = ("type", "finetuned")
_NUMBERS = [
  name
  for name in _NAMES
  if name not in ("rope_type", "truncate", "short_factor", "long_factor")
]


def given(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
  """The object of rotary positions in a config.json."""
  value = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
  if not isinstance(value, Mapping):
    raise LoraxError(f"config: rope_parameters must be an object, not {value!r}")
  return value


def read(
  parameters: Mapping[str, Any],
  hf_config: Mapping[str, Any],
  *,
  max_position_embeddings: int,
  theta: float,
  theta_name: str = "rope_theta",
) -> Rope:
  """One kind of rotary positions.

  Args:
    parameters: its fields (see `given`).
    hf_config: the full config.json, for fields that `parameters` lack.
    max_position_embeddings: of the model.
    theta: the base, if neither has one.
    theta_name: the field of the full config.json with the base.

  Raises:
    LoraxError: an unsupported type, an unknown parameter, or a value of the wrong type.
  """
  if not isinstance(parameters, Mapping):
    raise LoraxError(f"config: rope_parameters must be an object, not {parameters!r}")
  for name in parameters:
    if name not in (*_NAMES, *_OTHER):
      raise LoraxError("config: " + unknown("rope parameter", str(name), _NAMES))
  values = {k: v for k, v in parameters.items() if v is not None and k in _NAMES}
  values.setdefault("rope_type", parameters.get("type") or "default")
  values.setdefault("rope_theta", hf_config.get(theta_name) or theta)
  values.setdefault(
    "partial_rotary_factor", hf_config.get("partial_rotary_factor") or 1
  )
  if hf_config.get("original_max_position_embeddings") is not None:
    original = hf_config["original_max_position_embeddings"]
    values["original_max_position_embeddings"] = original
  for name in _NUMBERS:
    if name in values:
      fields.check(name, values[name], float, "a positive number", lambda x: x > 0)
  for name in ("short_factor", "long_factor"):
    if name in values:
      fields.check(name, values[name], list, "a list of numbers", bool)
      for x in values[name]:
        fields.check(name, x, float, "a list of positive numbers", lambda x: x > 0)
      values[name] = tuple(values[name])
  fields.check("rope_type", values["rope_type"], str, "a name", bool)
  if values["partial_rotary_factor"] > 1:
    raise LoraxError("config: partial_rotary_factor must be at most 1")
  return Rope(max_position_embeddings=max_position_embeddings, **values)

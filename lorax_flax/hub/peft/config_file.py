"""adapter_config.json, PEFT's file of an adapter: read and written."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from lorax_flax.errors import LoraxError, listing, prefixed
from lorax_flax.files import strict_json
from lorax_flax.hub.peft.config import (
  CONFIG_FILE,
  LORA,
  SEQ_CLS,
  PeftConfig,
  with_heads,
)
from lorax_flax.hub.peft.forms import fields_of, form_of
from lorax_flax.methods.peft_form import PeftForm

_MOST_BYTES = 16 << 20  # of a config: a list of every module's name is far smaller


def read(folder: Path, *, fresh: bool = False) -> PeftConfig:
  """Reads adapter_config.json of a PEFT folder.

  Raises:
    LoraxError: no such file, not JSON, a method that is not built here, or a field
      that would change the numbers and that we don't compute.
  """
  file = folder / CONFIG_FILE
  if not folder.is_dir():
    kind = "a file and no" if folder.is_file() else "no"
    hint = f": give {folder.parent}" if (folder.parent / CONFIG_FILE).is_file() else ""
    raise LoraxError(
      f"{folder} is {kind} folder; an adapter is a folder with {CONFIG_FILE}{hint}"
    )
  if not file.is_file():
    inside = [entry.name for entry in folder.iterdir()]
    raise LoraxError(
      f"no {CONFIG_FILE} in {folder}: it holds no PEFT adapter. It holds: "
      f"{listing(inside, most=12) or 'nothing'}"
    )
  raw = strict_json.read(file, most_bytes=_MOST_BYTES)
  with prefixed(f"{folder}"):
    return parse(raw, fresh=fresh)


def parse(raw: Any, *, fresh: bool = False) -> PeftConfig:
  """A PeftConfig from adapter_config.json's content; errors as of `read`.

  Args:
    fresh: an adapter is to be trained as it says, so that what changes the training
      alone is refused too.
  """
  if not isinstance(raw, dict):
    raise LoraxError(f"{CONFIG_FILE} must hold an object, not {type(raw).__name__}")
  form = form_of(raw.get("peft_type"))
  _check_version(raw.get("peft_version"), form)
  known = fields_of(form)
  values: dict[str, Any] = dict(known.values())
  # A type has no rank, or no scale, where no field of it means one.
  values |= {name: None for name in ("r", "lora_alpha") if name not in values}
  options: dict[str, Any] = {}
  in_training = {**dict.fromkeys(_IN_TRAINING), **form.training}
  for name, value in raw.items():
    if name in known:
      # null means the default where a field has one other than null.
      if value is not None:
        values[known[name][0]] = _frozen(value)
    elif name in form.options:
      if value is not None:
        options[form.options[name]] = _frozen(value)
    elif name in in_training and not fresh:
      continue
    elif name in form.off or name in form.training:
      allowed = form.off.get(name) or (form.training[name],)
      if value is not None and value not in allowed:
        raise _unhonoured(name, value)
    elif name not in _WITHOUT_EFFECT and not _is_off(name, value):
      raise _unhonoured(name, value)
  if values.get("bias", "none") not in ("none", "all"):
    if values["bias"] != form.targets_only:
      raise LoraxError(
        f"{CONFIG_FILE}: bias={values['bias']!r} is not what PEFT writes"
      )
    values["bias"] = _TARGETS_ONLY
  named = values.get("modules_to_save") or ()
  saves = "modules_to_save" in known and isinstance(named, tuple)
  if values.get("task_type") == SEQ_CLS and saves:
    # PEFT adds these whenever it loads such an adapter.
    values["modules_to_save"] = with_heads(named)
  return PeftConfig(**values, peft_type=form.type, options=options)


def _check_version(given: Any, form: PeftForm) -> None:
  number = lambda text: tuple(map(int, re.findall(r"\d+", text.partition("+")[0])[:3]))
  if form.since != "0" and number(str(given)) < number(form.since):
    raise LoraxError(
      f"{CONFIG_FILE}: peft_version={given!r}, and {form.type} meant something else "
      f"before {form.since}"
    )


def _unhonoured(name: str, value: Any) -> LoraxError:
  return LoraxError(
    f"{CONFIG_FILE}: {name}={value!r} changes what the adapter computes, and we "
    "cannot honour it. What PEFT can merge (merge_and_unload) is read as a base"
  )


def dump(config: PeftConfig) -> dict[str, Any]:
  """The content of adapter_config.json as PEFT itself would write it.

  It has every field of the type; those that we don't support are off.

  Raises:
    LoraxError: a value that the type has no field for.
  """
  form = form_of(config.peft_type)
  known = fields_of(form)
  _check_said(config, {ours for ours, _ in known.values()})
  raw: dict[str, Any] = dict(_OFF) if form.type == LORA or form.extends_lora else {}
  raw |= {name: values[0] for name, values in form.off.items()} | dict(form.training)
  raw |= {"inference_mode": True, "peft_type": form.type}
  raw |= {"peft_version": _VERSION} if form.since != "0" else {}
  raw |= {name: _thawed(config.options[ours]) for name, ours in form.options.items()}
  raw |= {name: _thawed(getattr(config, ours)) for name, (ours, _) in known.items()}
  if raw.get("bias") == _TARGETS_ONLY:
    raw["bias"] = form.targets_only
  return dict(sorted(raw.items()))


def _check_said(config: PeftConfig, known: set[str]) -> None:
  """Refuses a field that is set and that the type does not have."""
  for each in fields(config):
    empty = each.default if each.default_factory is MISSING else each.default_factory()
    value = getattr(config, each.name)
    is_set = value is not None and value != empty
    if is_set and each.name not in (*known, "peft_type", "options"):
      raise LoraxError(
        f"PEFT's {config.peft_type} has no {each.name}, and the adapter has {value!r}"
      )


def _frozen(value: Any) -> Any:
  """JSON's value with tuples for lists, one level of an object included."""
  if isinstance(value, dict):
    return {name: _frozen(each) for name, each in value.items()}
  return tuple(value) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
  """The inverse of `_frozen`."""
  if isinstance(value, Mapping):
    return {name: _thawed(each) for name, each in value.items()}
  return list(value) if isinstance(value, tuple) else value


# Of PEFT, whose form a folder has that is written here.
_VERSION = "0.21.2"

# LORA's name of the biases of the targets alone, and ours.
_TARGETS_ONLY = "lora_only"

# Records of how the file was made.
_WITHOUT_EFFECT = frozenset(
  {"inference_mode", "peft_type", "peft_version", "eva_config"}
)

# Those that change how an adapter is trained, and not what it computes then: VeLoRA's
# gradients, MonteCLoRA's samples, and QALoRA, which only GPTQ's layers know.
_IN_TRAINING = frozenset({"monteclora_config", "use_qalora", "velora_config"})

# Fields that we don't compute, with the values that turn them off. A field that we
# don't know is off where it is None, False or empty.
_OFF: Mapping[str, Any] = {
  "alora_invocation_tokens": None,
  "arrow_config": None,
  "corda_config": None,
  "eva_config": None,
  "kasa_config": None,
  "layer_replication": None,
  "loftq_config": {},
  "lora_ga_config": None,
  "megatron_config": None,
  "megatron_core": "megatron.core",
  "monteclora_config": None,
  "qalora_group_size": 16,
  "use_bdlora": None,
  "use_qalora": False,
  "velora_config": None,
}


def _is_off(name: str, value: Any) -> bool:
  # These two have an effect only where another field turns their feature on.
  detail = name in ("megatron_core", "qalora_group_size")
  return detail or value is None or value is False or value in ({}, [], "")

"""The shape of a run's model: as the config says, as config.json does, and both."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_flax.errors import LoraxError
from lorax_flax.hub.resolve import resolve
from lorax_flax.jobs.settings import Settings
from lorax_flax.models import registry
from lorax_flax.tasks.task import Kind


def check(
  wanted: Settings, kind: Kind, hf_config: Mapping[str, Any], folder: str
) -> registry.Outline:
  """The model that a config.json describes, where it fits the run.

  Args:
    folder: where the config.json is, for messages.

  Raises:
    LoraxError: it is no model of the task's kind, takes fewer tokens than
      data.max_length, or is another than model.hf_config says.
  """
  family = registry.of(hf_config)
  if family.task != kind.model:
    raise LoraxError(
      f"the task {kind.name} trains a {kind.model} model, and a "
      f"{hf_config['model_type']} is a {family.task} model"
    )
  model = _outline(wanted, kind, hf_config)
  if wanted.data.max_length > model.max_length:
    raise LoraxError(
      f"data.max_length is {wanted.data.max_length}, and this model takes at most "
      f"{model.max_length} tokens"
    )
  said = wanted.model.hf_config
  if said is not None and said is not hf_config:
    _check_same(_outline(wanted, kind, said), model, folder)
  return model


def described(wanted: Settings, kind: Kind) -> registry.Outline:
  """The model of a run without its weights.

  Of model.hf_config, where the config has one: nothing is looked for then. Otherwise of
  the config.json of model.path, which may be a folder with that file alone.

  Raises:
    LoraxError: there is neither; what `check` refuses.
  """
  said = wanted.model.hf_config
  if said is not None:
    return check(wanted, kind, said, "model.hf_config")
  folder = Path(wanted.model.path).expanduser()
  if not (folder / "config.json").is_file():
    folder = resolve(wanted.model.path)
  return check(wanted, kind, registry.read_config(folder), str(folder))


def _outline(
  wanted: Settings, kind: Kind, hf_config: Mapping[str, Any]
) -> registry.Outline:
  model = wanted.model
  return registry.outline(
    hf_config,
    num_labels=kind.num_labels,
    dtype=model.dtype,
    scan=model.scan,
    remat=model.remat,
  )


def _check_same(said: registry.Outline, found: registry.Outline, folder: str) -> None:
  there, here = _fields(found), _fields(said)
  differences = [
    f"{name} is {here.get(name)!r} there and {there.get(name)!r} in {folder}"
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]
  if differences:
    raise LoraxError(
      f"config.model.hf_config is not of this model: {'; '.join(differences)}. Name "
      "another --config.model.path, or say what it is: --config.model.hf_config.FIELD"
    )


def _fields(model: registry.Outline) -> dict[str, Any]:
  """What the numbers depend on, under config.json's names."""
  fields = dataclasses.asdict(model.config)
  return {"model_type": model.hf_config["model_type"], **fields}

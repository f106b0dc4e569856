"""The outline of a run's model: from the settings, from config.json, and compared."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lorax_flax.errors import LoraxError
from lorax_flax.hub.peft import folder as peft
from lorax_flax.hub.resolve import resolve
from lorax_flax.models import registry
from lorax_flax.models.settings import ModelSettings
from lorax_flax.models.soft import SoftSettings
from lorax_flax.sharding import mesh as meshes
from lorax_flax.tasks.task import Task

log = logging.getLogger(__name__)


def check(
  settings: ModelSettings,
  task: Task,
  max_length: int,
  hf_config: Mapping[str, Any],
  folder: str,
  soft: SoftSettings | None = None,
) -> registry.Outline:
  """The model that a config.json describes, where it fits the settings and the task.

  Args:
    max_length: number of tokens that it has to take.
    folder: where the config.json is, for messages.
    soft: trained states beside the weights.

  Raises:
    LoraxError: it is no model of the task's kind, takes fewer tokens, has the task's
      labels in another order, or differs from model.hf_config.
  """
  family = registry.of(hf_config)
  if family.task != task.model:
    raise LoraxError(
      f"the task {task.name} trains a {task.model} model, and a "
      f"{hf_config['model_type']} is a {family.task} model"
    )
  model = _outline(settings, task, hf_config, soft)
  if 0 < model.max_length < max_length:  # Images have no length.
    raise LoraxError(
      f"data.max_length is {max_length}, and this model takes at most "
      f"{model.max_length} tokens"
    )
  _check_labels(task, hf_config, folder)
  stated = settings.hf_config
  if stated is not None and stated is not hf_config:
    _check_same(_outline(settings, task, stated, soft), model, folder)
  return model


def check_tokens(model: registry.Outline, max_length: int, mesh: Mesh) -> None:
  """Raises LoraxError unless the model's tokens can be sharded along mesh.sequence.

  Args:
    max_length: number of tokens of the longest row.
  """
  ways = mesh.shape["sequence"]
  if ways == 1:
    return
  if not model.family.shards_tokens(model.config):
    raise LoraxError(
      f"mesh.sequence is {ways}, and the tokens of this {model.hf_config['model_type']}"
      " can't be sharded: mesh.data and mesh.fsdp are for any model"
    )
  if model.soft is not None:
    raise LoraxError(
      f"mesh.sequence is {ways}, and tokens can't be sharded with soft.method="
      f"{model.soft['method']}: its states are attended to beside them"
    )
  meshes.check_length(mesh, "data.max_length", max_length)


def for_adapter(settings: ModelSettings, folder: str | None) -> ModelSettings:
  """The settings of a model that the adapter in a PEFT folder fits."""
  if folder is None:
    return settings
  model = registry.outline(registry.read_config(resolve(settings.path)))
  needs = peft.needs(folder, model.keymap)
  made = dataclasses.replace(
    settings,
    untie=settings.untie or needs.untie,
    vocab_size=settings.vocab_size or needs.vocab_size,
  )
  if made != settings:
    log.warning(
      f"init_adapter {folder}: model.untie={made.untie} and "
      f"model.vocab_size={made.vocab_size}, as it needs"
    )
  return made


def described(
  settings: ModelSettings,
  task: Task,
  max_length: int,
  soft: SoftSettings | None = None,
) -> registry.Outline:
  """The model without its weights.

  It is made from model.hf_config, where that is set, with no look at any file; else
  from the config.json of model.path, which may be a folder with that file alone.

  Raises:
    LoraxError: there is neither; what `check` refuses.
  """
  stated = settings.hf_config
  if stated is not None:
    return check(settings, task, max_length, stated, "model.hf_config", soft)
  folder = Path(settings.path).expanduser()
  if not (folder / "config.json").is_file():
    folder = resolve(settings.path)
  hf_config = registry.read_config(folder)
  return check(settings, task, max_length, hf_config, str(folder), soft)


def _outline(
  settings: ModelSettings,
  task: Task,
  hf_config: Mapping[str, Any],
  soft: SoftSettings | None,
) -> registry.Outline:
  return registry.outline(
    hf_config,
    num_labels=task.num_labels,
    dtype=settings.dtype,
    scan=settings.scan,
    remat=settings.remat,
    untie=settings.untie,
    vocab_size=settings.vocab_size,
    soft=soft,
  )


def _check_labels(task: Task, hf_config: Mapping[str, Any], folder: str) -> None:
  """A head's output of another class would be taken for the task's."""
  stored = hf_config.get("id2label") or {}
  names = [str(stored.get(str(i))) for i in range(len(stored))]
  labels = list(task.labels or ())
  own, wanted = ([name.casefold() for name in each] for each in (names, labels))
  if own != wanted and sorted(own) == sorted(wanted):
    raise LoraxError(
      f"the head in {folder} has the labels {', '.join(names)} in this order, and the "
      f"task {task.name} has {', '.join(labels)}. For a new head save the body alone: "
      "transformers.AutoModel.from_pretrained(FOLDER).save_pretrained(OTHER)"
    )


def _check_same(stated: registry.Outline, found: registry.Outline, folder: str) -> None:
  there, here = _fields(found), _fields(stated)
  differences = [
    f"{name} is {here.get(name)!r} there and {there.get(name)!r} in {folder}"
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]
  if differences:
    raise LoraxError(
      f"config.model.hf_config is not of this model: {'; '.join(differences)}. Name "
      "another --config.model.path, or describe it: --config.model.hf_config.FIELD"
    )


def _fields(model: registry.Outline) -> dict[str, Any]:
  """The fields that numbers depend on, under config.json's names."""
  fields = dataclasses.asdict(model.config)
  return {"model_type": model.hf_config["model_type"], **fields}

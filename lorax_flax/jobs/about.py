"""Descriptions of a run for people: of its report, and the card of what it makes."""

import dataclasses
import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lorax_flax.adapt.plan import Plan
from lorax_flax.hub import card as hub_card
from lorax_flax.jobs import build, usage
from lorax_flax.jobs.export import form
from lorax_flax.jobs.settings import Settings
from lorax_flax.methods import Adapter
from lorax_flax.models import registry
from lorax_flax.tasks.task import Splits, Task
from lorax_flax.train.logs.page import About
from lorax_flax.version import __version__

_LIBRARIES = ("jax", "flax", "optax")
# The sections of a report that a card has too; the rest is of this machine.
_OF_CARD = ("Adapter", "Base", "Data", "Versions")


def about(
  settings: Settings,
  task: Task,
  model: registry.Loaded,
  plan: Plan,
  adapter: Adapter,
  splits: Splits,
  lengths: Sequence[int],
  workdir: Path,
) -> About:
  """The description of a run that is about to start.

  Args:
    adapter: before the first step.
    lengths: padded lengths of the batches.
    workdir: of the run.
  """
  described = build.describe(plan, adapter, model.params)
  base = {
    "name": settings.model.path,
    "type": str(model.hf_config["model_type"]),
    **hub_card.license_of(settings.model.path, model.folder),
    "memory": described.pop("base"),
  }
  rows = {"train": splits.train, **splits.evaluation}
  places = [getattr(settings.data, name, None) for name in ("path", "glue_dir")]
  data = {
    "task": task.name,
    **({"path": ", ".join(found)} if (found := list(filter(None, places))) else {}),
    **{name: f"{len(split):,} examples" for name, split in rows.items()},
    **({"labels": ", ".join(task.labels)} if task.labels else {}),
    **({"padded lengths": ", ".join(map(str, lengths))} if model.max_length else {}),
  }
  versions = {n: importlib.metadata.version(n) for n in _LIBRARIES}
  devices = jax.devices()
  here = {
    "command": shlex.join(["python", *sys.orig_argv[1:]]),
    "devices": f"{len(devices)} × {devices[0].device_kind}",
    "base's folder": str(model.folder),
  }
  return About(
    f"{task.name}, {settings.model.path}",
    {
      "Adapter": _adapter(settings, model, adapter) | described,
      "Base": base,
      "Data": data,
      "Versions": {
        "lorax_flax": __version__,
        **versions,
        "Python": platform.python_version(),
      },
      "Run": here,
    },
    settings.to_json(),
    _usage(settings, task, model, adapter, str(workdir)),
  )


def card(
  settings: Settings,
  task: Task,
  model: registry.Loaded,
  adapter: Adapter,
  about: About,
  result: Mapping[str, Any],
) -> str:
  """The card of what a run makes; it speaks of its own folder as "."."""
  made, method = form(adapter, model.keymap), settings.lora.method
  name = hub_card.base_model(settings.model.path)
  libraries = {"peft": "peft", "orbax": "lorax_flax", "model": "transformers"}
  tags = ["lorax_flax", *([f"base_model:adapter:{name}", method] * (made != "model"))]
  data = {
    "base_model": name,
    "library_name": libraries[made],
    **hub_card.license_of(settings.model.path, model.folder),
    "pipeline_tag": usage.PIPELINES[model.family.task],
    "tags": tags,
  }
  what = "fine-tuned" if made == "model" else f"{settings.lora.method} adapter"
  return hub_card.text(
    f"{settings.model.path}, {what} for {task.name}",
    data,
    {section: about.facts[section] for section in _OF_CARD},
    _usage(settings, task, model, adapter, None),
    {score: result[score] for score in result["last"]},
    task.name,
  )


def _adapter(
  settings: Settings, model: registry.Loaded, adapter: Adapter
) -> dict[str, str]:
  config = settings.lora
  if form(adapter, model.keymap) == "model":
    every = adapter.keys() >= model.keymap.keys.keys()
    return {"method": "full fine-tuning" if every else "weights trained in full"}
  names = ("method", "rank", "alpha", "use_rslora", "targets", "tuned", "dropout")
  fields = dataclasses.asdict(config)
  found = {
    name: _text(fields[name]) for name in names if fields[name] not in ((), False)
  }
  return found if model.soft is None else {**found, "soft": settings.soft.described}


def _text(value: Any) -> str:
  plain = isinstance(value, str) or not isinstance(value, Sequence)
  return str(value) if plain else ", ".join(map(str, value))


def _usage(
  settings: Settings,
  task: Task,
  model: registry.Loaded,
  adapter: Adapter,
  workdir: str | None,
) -> dict[str, str]:
  """Code for the folder in a workdir; None: from inside that folder."""
  kind, path = model.family.task, settings.model.path
  made = form(adapter, model.keymap)
  if made == "model":
    return usage.of_model(kind, "." if workdir is None else f"{workdir}/model")
  folder = "." if workdir is None else f"{workdir}/adapter"
  hub_name, peft = hub_card.base_model(path), made == "peft"
  return usage.of_adapter(kind, path, hub_name, folder, task.num_labels, peft)

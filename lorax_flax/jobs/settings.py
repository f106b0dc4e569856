"""Settings of a run: frozen dataclasses that validate."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.data.config import DataSettings
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.models.settings import ModelSettings
from lorax_flax.sharding.mesh import MeshConfig
from lorax_flax.tasks import task as tasks
from lorax_flax.train.config import DURATIONS, TrainConfig


@dataclass(frozen=True)
class Settings:
  """One run.

  Attributes:
    init_adapter: a PEFT folder whose weights training starts from.
    compilation_cache: a folder, or gs://…, that keeps compiled programs for the next
      start.
  """

  model: ModelSettings
  data: DataSettings
  lora: LoraConfig
  train: TrainConfig
  init_adapter: str | None = None
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  compilation_cache: str | None = None

  def __post_init__(self):
    tasks.of(self.data)  # Refuses what the task does not read.
    for name, value in (
      ("model.path", self.model.path),
      ("init_adapter", self.init_adapter),
    ):
      if value is not None and value.startswith("gs://"):
        raise LoraxError(
          f"{name} is {value}: models and adapters are not read from buckets; copy it "
          "to a folder"
        )

  def to_json(self) -> dict[str, Any]:
    """The content of config.json: all but the fields that a resumed run may change."""
    values = dataclasses.asdict(self)
    for name in ("mesh", "compilation_cache"):
      del values[name]
    return values


_SECTIONS = {"model", "data", "train", "mesh"}
_TOP = ("seed", "init_adapter", "compilation_cache", "lora", *sorted(_SECTIONS))


def convert(config: ConfigDict, overridden: Collection[str] = ()) -> Settings:
  """Settings of a config.

  Args:
    config: as in `experiments.configs.common.base`.
    overridden: fields given on the command line, "train.steps". One of a duration's
      units takes the place of the others, that the config has.

  Raises:
    LoraxError: an unknown field, or a value that can't be.
  """
  values = config.to_dict()
  for name in values:
    if name not in _TOP:
      raise LoraxError(unknown("config field", name, _TOP))
  train = _one_unit_each(dict(values["train"]), overridden) | {"seed": values["seed"]}
  lora = dict(values["lora"])
  for name in ("targets", "exclude", "tuned"):
    if name in lora:
      lora[name] = patterns(lora[name])
  model = dict(values["model"])
  model["hf_config"] = model.get("hf_config") or None
  return Settings(
    model=_build(ModelSettings, "model", model),
    data=_build(DataSettings, "data", values["data"]),
    lora=_build(LoraConfig, "lora", lora),
    train=_build(TrainConfig, "train", train),
    mesh=_build(MeshConfig, "mesh", values.get("mesh", {})),
    init_adapter=values.get("init_adapter"),
    compilation_cache=values.get("compilation_cache"),
  )


def patterns(value: Any) -> str | tuple[str, ...]:
  """Which weights, as `LoraConfig` takes it.

  "all-linear" and regular expressions for whole paths, ".*/(query|value)/kernel", stay
  as they are. Plain names, "query,value" or ("query", "value"), are ends of paths.

  Raises:
    LoraxError: neither a text nor texts.
  """
  if isinstance(value, str):
    plain = re.fullmatch(r"[\w/]+(,[\w/]+)*,?", value)
    return tuple(filter(None, value.split(","))) if plain else value
  if isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value):
    return tuple(value)
  raise LoraxError(f"weights are named by a text or several, not {value!r}")


def _one_unit_each(
  train: dict[str, Any], overridden: Collection[str]
) -> dict[str, Any]:
  for units in DURATIONS:
    if any(f"train.{name}" in overridden for name in units):
      train |= {name: None for name in units if f"train.{name}" not in overridden}
  return train


def _build(kind: Any, section: str, values: Mapping[str, Any]) -> Any:
  known = {field.name for field in dataclasses.fields(kind)}
  for name in values:
    if name not in known:
      raise LoraxError(
        unknown("config field", f"{section}.{name}", [f"{section}.{k}" for k in known])
      )
  return kind(**values)

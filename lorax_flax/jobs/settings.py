"""Where a ConfigDict ends: what it says, as frozen dataclasses that validate."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.data import tasks
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.sharding.mesh import MeshConfig
from lorax_flax.train.config import DURATIONS, TrainConfig

DTYPES = ("float32", "bfloat16")
NEXT_TOKEN = "next_token"
REMAT = ("none", "full", "dots")


@dataclass(frozen=True)
class ModelSettings:
  """Which model, and how it computes.

  Attributes:
    path: a folder, a name on the hub or an alias.
    hf_config: what its config.json says, so that the step can be compiled without the
      model; a config.json that says otherwise is an error. None where that is unknown.
    dtype: of computing; weights that train are float32.
    param_dtype: of frozen weights in memory; None leaves each as it is stored.
    scan: whether the layers are stacked and scanned.
    remat: what is recomputed in the backward pass: "none", "full", "dots".
    dropout: in the encoder; None takes the checkpoint's.
    head_dropout: before the classifier; None takes the checkpoint's.
  """

  path: str
  hf_config: Mapping[str, Any] | None = None
  dtype: str = "float32"
  param_dtype: str | None = None
  scan: bool = False
  remat: str = "none"
  dropout: float | None = None
  head_dropout: float | None = None

  def __post_init__(self):
    for name in ("dtype", "param_dtype"):
      value = getattr(self, name)
      if value is not None and value not in DTYPES:
        raise LoraxError(unknown(f"model.{name}", value, DTYPES))
    if self.remat not in REMAT:
      raise LoraxError(unknown("model.remat", self.remat, REMAT))


@dataclass(frozen=True)
class DataSettings:
  """Which examples, and how they become batches.

  Attributes:
    task: a key of `lorax_flax.data.tasks.TASKS`, or NEXT_TOKEN.
    path: for NEXT_TOKEN, a folder with train.jsonl and validation.jsonl, whose lines
      `lorax_flax.data.sequences` reads.
    max_length: tokens that an example is cut to.
    buckets: how many lengths batches may have at most.
    glue_dir: a folder of GLUE's TSVs; None takes TFDS's data.
    tfds_dir: where TFDS keeps data; None is its own choice.
  """

  task: str
  path: str | None = None
  max_length: int = 128
  buckets: int = 4
  glue_dir: str | None = None
  tfds_dir: str | None = None

  def __post_init__(self):
    known = [*tasks.TASKS, NEXT_TOKEN]
    if self.task not in known:
      raise LoraxError(unknown("task", self.task, known))
    others = ("glue_dir", "tfds_dir") if self.task == NEXT_TOKEN else ("path",)
    for name in others:
      if getattr(self, name) is not None:
        raise LoraxError(f"data.{name} is of no use to the task {self.task}")
    for name in ("max_length", "buckets"):
      if getattr(self, name) < 1:
        raise LoraxError(f"data.{name} must be at least 1, not {getattr(self, name)}")
    if self.glue_dir is not None and self.tfds_dir is not None:
      raise LoraxError("give data.glue_dir or data.tfds_dir, not both")


@dataclass(frozen=True)
class Settings:
  """One run.

  Attributes:
    compilation_cache: a folder, or gs://…, that keeps compiled programs.
  """

  model: ModelSettings
  data: DataSettings
  lora: LoraConfig
  train: TrainConfig
  init_adapter: str | None = None
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  compilation_cache: str | None = None

  def __post_init__(self):
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
    """For config.json: all but what a run may go on without, or with another one."""
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

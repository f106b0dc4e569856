"""Settings of a run: frozen dataclasses that validate."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.data import tasks
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.sharding.mesh import MeshConfig
from lorax_flax.train.config import TrainConfig

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

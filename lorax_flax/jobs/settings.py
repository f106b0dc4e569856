"""Settings of a run: frozen dataclasses that validate."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.data.config import DataSettings
from lorax_flax.errors import LoraxError
from lorax_flax.models.settings import ModelSettings
from lorax_flax.models.soft import SoftSettings
from lorax_flax.sharding.mesh import MeshConfig
from lorax_flax.tasks import task as tasks
from lorax_flax.train.config import TrainConfig


@dataclass(frozen=True)
class Settings:
  """One run.

  Attributes:
    init_adapter: a PEFT folder whose weights training starts from.
    compilation_cache: a folder, or gs://…, that keeps compiled programs for the next
      start; None: JAX_COMPILATION_CACHE_DIR, or else one in the user's cache.
  """

  model: ModelSettings
  data: DataSettings
  lora: LoraConfig
  train: TrainConfig
  init_adapter: str | None = None
  soft: SoftSettings = dataclasses.field(default_factory=SoftSettings)
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

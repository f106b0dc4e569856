"""The options that a suggestion chooses from: mesh, remat policy, batch size."""

import dataclasses
import math
from dataclasses import dataclass

from lorax_flax.jobs.settings import Settings
from lorax_flax.models.remat import REMAT
from lorax_flax.sharding.mesh import AXES, MeshConfig, spell

# Fewest tokens of a row that a chip is to have: rows of fewer need no more chips.
_FEWEST_TOKENS = 2048


@dataclass(frozen=True)
class Option:
  """One way to run.

  Attributes:
    mesh: number of chips along each axis of AXES.
    remat, batch: model.remat and train.batch_size.
  """

  mesh: tuple[int, ...]
  remat: str
  batch: int

  @property
  def sizes(self) -> dict[str, int]:
    """Sizes of the mesh's axes by name."""
    return dict(zip(AXES, self.mesh, strict=True))

  def of(self, settings: Settings) -> Settings:
    """The settings with this option."""
    return dataclasses.replace(
      settings,
      mesh=MeshConfig(**self.sizes),
      model=dataclasses.replace(settings.model, remat=self.remat),
      train=dataclasses.replace(
        settings.train, batch_size=self.batch, eval_batch_size=self.batch
      ),
    )

  def needs_more_than(self, other: "Option") -> bool:
    """True if it takes at least the memory of another option on the same mesh."""
    return (
      self.mesh == other.mesh
      and self.batch >= other.batch
      and REMAT.index(self.remat) <= REMAT.index(other.remat)
    )

  def __str__(self) -> str:
    mesh = spell(self.sizes) or "one chip"
    return f"{mesh}, remat {self.remat}, batch {self.batch}"


def meshes(
  chips: int, experts: int = 1, tokens: int | None = None
) -> list[tuple[int, ...]]:
  """Every mesh of a number of chips, the likely good ones first.

  Args:
    experts: number of experts of the model, a multiple of the expert axis.
    tokens: of a row, if the model can shard them: long rows are sharded too.

  Returns:
    Sizes along AXES.
  """
  found = [
    (data, fsdp, left // data // fsdp, expert, sequence)
    for sequence in _divisors(math.gcd(chips, tokens or 1))
    if sequence == 1 or (tokens or 1) // sequence >= _FEWEST_TOKENS
    for expert in _divisors(math.gcd(chips // sequence, experts))
    for left in (chips // sequence // expert,)
    for data in _divisors(left)
    for fsdp in _divisors(left // data)
  ]
  return sorted(found, key=lambda sizes: (sizes[0], sizes[2], sizes[3], sizes[4]))


def _divisors(n: int) -> list[int]:
  return [i for i in range(1, n + 1) if n % i == 0]

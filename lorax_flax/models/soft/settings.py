"""Settings of a soft part."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from lorax_flax.errors import LoraxError, check_known, listing
from lorax_flax.models import ops
from lorax_flax.models.soft import bottleneck, prefix, prompt
from lorax_flax.models.soft.part import Part

PARTS: Mapping[str, Part] = {
  "prefix": prefix.PART,
  "prompt": prompt.PART,
  "houlsby": bottleneck.HOULSBY,
  "pfeiffer": bottleneck.PFEIFFER,
}


@dataclass(frozen=True)
class SoftSettings:
  """Trained states beside the model's weights, with LoRA or alone.

  Attributes:
    method: "prefix" (keys and values before those of each layer's tokens), "prompt"
      (embeddings before those of the tokens), "houlsby" (bottleneck adapters after
      attention and the feed-forward part) or "pfeiffer" (after the latter); None: none.
    length: number of virtual tokens of a prefix or a prompt.
    size: features inside a bottleneck adapter.
    activation: inside a bottleneck adapter.
    std: standard deviation of what starts at random; None takes the method's, PEFT's 1
      for a prefix and a prompt.
  """

  method: str | None = None
  length: int = 20
  size: int = 64
  activation: str = "relu"
  std: float | None = None

  def __post_init__(self):
    if self.method is not None:
      check_known("soft.method", self.method, PARTS)
    reads = () if self.method is None else self.part.reads
    for each in fields(self):
      if each.name not in ("method", *reads) and getattr(self, each.name) != (
        each.default
      ):
        raise LoraxError(
          f"soft.{each.name} does nothing with soft.method={self.method}, which reads "
          f"{listing(f'soft.{name}' for name in reads) or 'no other field'}"
        )
    for name in ("length", "size"):
      if getattr(self, name) < 1:
        raise LoraxError(f"soft.{name} is {getattr(self, name)}, not 1 or more")
    if self.std is not None and self.std < 0:
      raise LoraxError(f"soft.std is {self.std}, not 0 or more")
    ops.activation(self.activation)

  @property
  def part(self) -> Part:
    """The row of the method."""
    assert self.method is not None
    return PARTS[self.method]

  @property
  def described(self) -> str:
    """The method and what it reads, for a person."""
    values = (f"{name} {getattr(self, name)}" for name in self.part.reads)
    return ", ".join([str(self.method), *values])

  def std_of(self, path: str) -> float:
    """Standard deviation of the start of a leaf."""
    names = path.split("/")
    std = next(std for name, std in self.part.std.items() if name in names)
    return self.std if std and self.std is not None else std


def places(soft: SoftSettings | None) -> int:
  """Number of places before the tokens' own."""
  return soft.length if soft is not None and "length" in soft.part.reads else 0

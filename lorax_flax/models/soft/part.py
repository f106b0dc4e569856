"""The declaration of a soft part."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
  """One kind of trained states.

  Attributes:
    std: standard deviation of the start, by a name in a leaf's path; the first that is
      there counts.
    reads: fields of the settings, beside the method, that it depends on.
    after: parts of a layer whose outputs a bottleneck adapter changes.
    peft: PEFT's peft_type, a key of `hub.peft.soft.FORMS`; None where it has none.
  """

  std: Mapping[str, float]
  reads: tuple[str, ...]
  after: tuple[str, ...] = field(default=())
  peft: str | None = None

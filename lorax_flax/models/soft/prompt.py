"""Prompt tuning (arXiv 2104.08691): trained embeddings before those of the tokens.

The LoRA paper's PrefixEmbed is the same. They pass through all layers as tokens do.
"""

from typing import Any

import flax.linen as nn

from lorax_flax.models.soft.part import Part

PART = Part(std={"embedding": 1.0}, reads=("length", "std"), peft="PROMPT_TUNING")


class Prompt(nn.Module):
  """The embeddings, PxD.

  Attributes:
    shape: (P, D).
    std: of fresh ones.
  """

  shape: tuple[int, int]
  std: float

  @nn.compact
  def __call__(self) -> Any:
    start = nn.initializers.normal(self.std)
    init = nn.with_logical_partitioning(start, ("positions", "embed"))
    return self.param("embedding", init, self.shape)

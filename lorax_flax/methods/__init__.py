"""Deltas: one small pytree node a method.

Each says which of its leaves are trained, and holds static roles of the kernel's axes.
A low-rank method answers three questions: how it starts (its `init`), what it makes of
a product with the kernel (`parts`), and of the kernel itself (`merged`).
"""

from lorax_flax.methods.dora import DoRA
from lorax_flax.methods.full import Tuned
from lorax_flax.methods.lora import LoRA
from lorax_flax.methods.lora_bias import BiasLoRA
from lorax_flax.methods.low_rank import LowRank, Parts
from lorax_flax.methods.token_rows import Rows

# What changes a weight as it is used, and what takes its place.
Followed = LowRank | Rows
Delta = Followed | Tuned
Adapter = dict[str, Delta]

__all__ = [
  "Adapter",
  "BiasLoRA",
  "Delta",
  "DoRA",
  "Followed",
  "LoRA",
  "LowRank",
  "Parts",
  "Rows",
  "Tuned",
]

"""Deltas: one small pytree node a method.

Each says which of its leaves are trained, and holds static roles of the kernel's axes.
"""

from lorax_flax.methods.lora import LoRA
from lorax_flax.methods.tuned import Tuned

Delta = LoRA | Tuned
Adapter = dict[str, Delta]

__all__ = ["Adapter", "Delta", "LoRA", "Tuned"]

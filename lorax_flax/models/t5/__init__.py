"""T5."""

from lorax_flax.models.t5.model import FAMILIES

__all__ = ["FAMILIES"]

"""DeBERTa v2 and v3."""

from lorax_flax.models.deberta.model import FAMILIES

__all__ = ["FAMILIES"]

"""Llama and its relatives."""

from lorax_flax.models.llama.variants import FAMILIES

__all__ = ["FAMILIES"]

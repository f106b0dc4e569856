"""BERT, RoBERTa and XLM-RoBERTa."""

from lorax_flax.models.bert.model import FAMILIES

__all__ = ["FAMILIES"]

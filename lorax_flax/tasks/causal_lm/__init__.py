"""Causal language modelling: texts, chats and token ids of a user's own files."""

from lorax_flax.tasks.causal_lm.task import TASK

__all__ = ["TASK"]

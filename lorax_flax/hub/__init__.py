"""Readers and writers: Hugging Face checkpoints, PEFT, loralib and vLLM adapters."""

from lorax_flax.hub.peft.folder import from_peft, read_adapter, to_peft, write_adapter

__all__ = ["from_peft", "read_adapter", "to_peft", "write_adapter"]

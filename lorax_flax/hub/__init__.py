"""In and out: checkpoints of Hugging Face, adapters of PEFT, loralib and vLLM."""

from lorax_flax.hub.peft.folder import from_peft, read_adapter, to_peft, write_adapter

__all__ = ["from_peft", "read_adapter", "to_peft", "write_adapter"]

"""Tokenizers of checkpoints, built as transformers builds them."""

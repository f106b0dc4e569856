"""Files that lie beside the checkout."""

from pathlib import Path

import pytest

_SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def loralib_file():
  """LoRA's authors' released adapter of RoBERTa-base for MNLI."""
  return _SHARED / "loralib" / "roberta_base_lora_mnli.bin"

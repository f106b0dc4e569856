"""A loralib checkpoint: one that the tests make, and the released one."""

import pytest


@pytest.fixture(
  scope="session",
  params=["made", pytest.param("released", marks=pytest.mark.real_data)],
)
def loralib_file(request, tmp_path_factory):
  """A file of loralib's for RoBERTa-base with three labels: rank 8, alpha 16.

  "released" is the one that LoRA's authors gave for MNLI.
  """
  if request.param == "released":
    folder = request.getfixturevalue("real_data")
    return folder / "loralib" / "roberta_base_lora_mnli.bin"
  from tests.hub import roberta_lora

  return roberta_lora.write(tmp_path_factory.mktemp("loralib") / "lora.bin")

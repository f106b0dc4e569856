"""The table of errors, for its quickest family; tests/hub has the others."""

import pytest

from benchmarks import parity
from benchmarks.peers import PEERS


@pytest.mark.filterwarnings("ignore")  # of torch's and PEFT's, about themselves
@pytest.mark.parametrize("family", ["vit"])
def test_adapters_go_both_ways_and_train_as_pefts_do(tmp_path, family):
  found = parity.measure(PEERS[family], tmp_path)
  assert found["logits"] < 1e-4
  assert found["in"] < 1e-4
  assert found["out"] < 1e-4
  assert found["trip"].startswith("0 of ")
  assert found["loss"] < 1e-3
  assert found["adapter"] < 1e-3

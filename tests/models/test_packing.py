"""Packed rows of every causal family: each row's loss is that of the row alone."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax_flax.data import packing
from lorax_flax.data.sequences import Sequences
from lorax_flax.data.tokens import Tokens, ragged
from lorax_flax.models import registry
from tests.models import test_decoder, test_gpt2, test_moe

LENGTHS, ROOM = (12, 5, 7, 11, 3, 6, 2), 23
_DYNAMIC = {
  "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
  "max_position_embeddings": 9,
}
# Of each family and of what differs between them: how its tiny checkpoint is saved.
FAMILIES = {
  **{name: peer.save for name, peer in (test_decoder.PEERS | test_moe.PEERS).items()},
  "llama, dynamic": lambda folder: test_decoder.LLAMA.save(folder, **_DYNAMIC),
  "gpt2": test_gpt2.save,
}


def _losses(loaded, rows):
  """The loss of each predicted token by the id of the row and its position."""
  index = np.arange(len(rows))
  batch = rows.batch(index, ROOM)
  named = ("input_ids", "attention_mask", "position_ids")
  inputs = {name: jnp.asarray(batch[name]) for name in named if name in batch}
  logits = loaded.module.apply({"params": loaded.params}, **inputs)
  labels = batch["labels"][:, 1:]
  found = optax.softmax_cross_entropy_with_integer_labels(
    logits[:, :-1], np.maximum(labels, 0)
  )
  return np.asarray(found), labels >= 0


def _rows():
  rng = np.random.default_rng(0)
  ids_S, offsets = ragged([rng.integers(3, 37, n) for n in LENGTHS])
  return Sequences(Tokens(ids_S, offsets, pad_id=0), ids_S.copy())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_rows_loss_is_that_of_the_row_alone(tmp_path, name):
  FAMILIES[name](tmp_path)
  loaded = registry.load(tmp_path)
  rows = _rows()
  alone, learnt = _losses(loaded, rows)
  expected = [x[mask] for x, mask in zip(alone, learnt, strict=True)]
  packs = packing.pack(rows, ROOM)
  assert len(packs) == 2
  packed, learnt = _losses(loaded, packs)
  order = packing.best_fit(rows.lengths_N, ROOM)
  for pack, losses, mask in zip(order, packed, learnt, strict=True):
    ends = np.cumsum([LENGTHS[row] - 1 for row in pack])
    for row, found in zip(pack, np.split(losses[mask], ends[:-1]), strict=True):
      np.testing.assert_allclose(found, expected[row], rtol=1e-5, atol=1e-5)


def test_every_causal_family_is_in_the_table():
  causal = {n for n, f in registry.FAMILIES.items() if f.task == "causal-lm"}
  assert causal - {"gemma3_text"} <= FAMILIES.keys()
  assert "gemma3" in FAMILIES

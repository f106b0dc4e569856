import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lorax_flax.data.sequences import IGNORED
from lorax_flax.models import head as heads
from lorax_flax.train import losses
from lorax_flax.train.token_scores import count, next_labels, token_scores


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_torch(smoothing):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(16, 3)).astype(np.float32) * 3
  labels = rng.integers(0, 3, 16)
  wanted = torch.nn.functional.cross_entropy(
    torch.tensor(logits),
    torch.tensor(labels),
    label_smoothing=smoothing,
    reduction="none",
  )
  ours = losses.cross_entropy(smoothing)(
    jnp.asarray(logits), {"labels": jnp.asarray(labels)}
  )
  np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


def test_losses_are_float32_whatever_the_logits_are():
  logits = jnp.ones((4, 3), jnp.bfloat16)
  assert (
    losses.cross_entropy()(logits, {"labels": jnp.zeros(4, jnp.int32)}).dtype
    == jnp.float32
  )
  one = logits[:, :1]
  assert (
    losses.squared_error(one, {"labels": jnp.zeros(4, jnp.float32)}).dtype
    == jnp.float32
  )


def test_binary_cross_entropy_equals_torch():
  rng = np.random.default_rng(3)
  logits = (30 * rng.normal(size=(6, 4))).astype(np.float32)
  labels = rng.integers(0, 2, (6, 4)).astype(np.float32)
  wanted = torch.nn.functional.binary_cross_entropy_with_logits(
    torch.tensor(logits), torch.tensor(labels), reduction="none"
  ).mean(-1)
  found = losses.binary_cross_entropy(jnp.asarray(logits), {"labels": labels})
  np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_squared_error_equals_torch():
  logits = np.array([[0.5], [2.0], [-1.0]], np.float32)
  labels = np.array([1.0, 2.5, 3.0], np.float32)
  wanted = torch.nn.functional.mse_loss(
    torch.tensor(logits[:, 0]), torch.tensor(labels), reduction="none"
  )
  ours = losses.squared_error(jnp.asarray(logits), {"labels": jnp.asarray(labels)})
  np.testing.assert_allclose(ours, wanted, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("room", [1, 4 * 3 * 11, 4 * 7 * 11])
def test_next_token_is_torchs_over_a_batchs_tokens(smoothing, room):
  rng = np.random.default_rng(3)
  logits_BxTxV = rng.normal(size=(4, 7, 11)).astype(np.float32)
  labels_BxT = rng.integers(0, 11, (4, 7)).astype(np.int32)
  labels_BxT[0, 3:] = IGNORED
  labels_BxT[1, :4] = IGNORED
  labels_BxT[2, 1:] = IGNORED  # Nothing is left to predict.
  next_BxT = next_labels(jnp.asarray(labels_BxT))
  logits = jnp.asarray(logits_BxTxV)
  head = heads.linear(jnp.eye(logits.shape[-1]))
  scores = token_scores(head, logits, next_BxT, smoothing, room)
  got_B = losses.next_token(scores, {})
  weights_B = count(next_BxT)
  np.testing.assert_array_equal(weights_B, [2, 3, 0, 6])
  assert got_B[2] == 0
  want = torch.nn.functional.cross_entropy(
    torch.tensor(logits_BxTxV[:, :-1]).flatten(0, 1),
    torch.tensor(labels_BxT[:, 1:]).long().flatten(),
    label_smoothing=smoothing,
  )
  mean = (got_B * weights_B).sum() / weights_B.sum()
  np.testing.assert_allclose(mean, want.numpy(), rtol=1e-6)

"""Losses over chunks of tokens, against the plain loss of all logits."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_flax as lx
from lorax_flax.data.sequences import IGNORED
from lorax_flax.models import head as heads
from lorax_flax.models import registry
from lorax_flax.train.token_scores import next_labels, token_scores
from tests.models import decoders

# A family, its fields, and the targets: the head's own kernel, a tied table, neither.
CASES = {
  "head": ("Llama", {"tie_word_embeddings": False}, ["lm_head", "q_proj"]),
  "tied": ("Llama", {"tie_word_embeddings": True}, ["embed_tokens", "v_proj"]),
  "capped": ("Gemma2", {"final_logit_softcapping": 2.0}, ["q_proj", "embed_tokens"]),
  "frozen": ("Qwen2", {"tie_word_embeddings": False}, ["q_proj", "v_proj"]),
}


def _plain(logits_BxTxV, labels_BxT):
  """Mean cross entropy of each row's labelled tokens, of all logits at once."""
  logp_BxTxV = jax.nn.log_softmax(logits_BxTxV)
  known_BxT = labels_BxT != IGNORED
  index_BxT = jnp.where(known_BxT, labels_BxT, 0)
  picked_BxT = jnp.take_along_axis(logp_BxTxV, index_BxT[..., None], -1)[..., 0]
  sum_B = jnp.where(known_BxT, picked_BxT, 0.0).sum(-1)
  return -sum_B / known_BxT.sum(-1).astype(jnp.float32)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", CASES)
def test_chunks_have_the_plain_losss_value_and_gradient(tmp_path, name, method):
  family, fields, targets = CASES[name]
  decoders.Peer(family, fields).save(tmp_path)
  model = registry.load(tmp_path)
  batch = decoders.batch(13, 9, 7)
  labels_BxT = np.where(batch["attention_mask"] == 1, batch["input_ids"], IGNORED)
  labels_BxT[0, :4] = IGNORED
  next_BxT = next_labels(jnp.asarray(labels_BxT))
  config = lx.LoraConfig(rank=3, targets=targets, method=method)

  def loss(room):
    def apply_fn(params, batch):
      if room is None:
        return _plain(model.module.apply({"params": params}, **batch), next_BxT)

      def readout(head, x_BxTxD):
        return token_scores(head, x_BxTxD, next_BxT, room=room)

      scores = model.module.apply({"params": params}, **batch, readout=readout)
      return -scores.smoothed

    lora = lx.adapt(apply_fn, config)
    adapter = lora.init(jax.random.key(0), model.params, batch)
    adapter = jax.tree.map(
      lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape),
      adapter,
    )
    total = lambda adapter: lora.apply(model.params, adapter, batch).sum()
    return jax.jit(jax.value_and_grad(total))(adapter)

  want, want_grads = loss(None)
  # 37 tokens in the vocabulary and 3 rows: 13, 5 and 1 of a row's tokens at a time.
  for room in (2**24, 37 * 3 * 5, 1):
    got, grads = loss(room)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    for path in want_grads:
      for leaf in want_grads[path].trained:
        got_grad, right = (getattr(each[path], leaf) for each in (grads, want_grads))
        err_msg, atol = f"{path} {leaf}", 2e-6 * float(jnp.abs(right).max())
        np.testing.assert_allclose(
          got_grad, right, rtol=1e-5, atol=atol, err_msg=err_msg
        )


def test_a_platform_that_is_not_known_has_room_too(monkeypatch):
  """Any plugin of JAX may be one; it is as a CPU."""
  head, x = heads.linear(jnp.ones((4, 8))), jnp.ones((1, 3, 4))
  labels = jnp.zeros((1, 3), jnp.int32)
  expected = token_scores(head, x, labels)
  module = sys.modules["lorax_flax.train.token_scores"]
  monkeypatch.setattr(module.devices, "platform", lambda: "another")
  assert module.room_of("another") == module.room_of("cpu") < module.room_of("gpu")
  found = token_scores(head, x, labels)
  np.testing.assert_array_equal(found.smoothed, expected.smoothed)

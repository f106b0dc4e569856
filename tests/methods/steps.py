"""Three steps of an adapter and of PEFT's model, whose losses must be the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import lorax_flax as lx


def clipped_adamw(learning_rate, clip):
  return optax.chain(
    optax.clip_by_global_norm(clip), optax.adamw(learning_rate, weight_decay=0.1)
  )


def trained_beside(
  lora, params, adapter, model, x, learning_rate, optimizer=None, clip=np.inf
):
  """The adapter after its steps; the model is trained in place.

  Args:
    optimizer: ours, if not AdamW.
    clip: the largest norm of the model's gradients.
  """
  trained, rest = lx.partition(adapter, lx.trainable_mask(adapter))
  optimizer = optimizer or optax.adamw(learning_rate, weight_decay=0.1)
  state = optimizer.init(trained)
  theirs = torch.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad], learning_rate, weight_decay=0.1
  )

  @jax.jit
  def step(trained, state):
    def loss(trained):
      return jnp.square(lora.apply(params, lx.combine(trained, rest), x)).sum()

    value, grad = jax.value_and_grad(loss)(trained)
    with jax.numpy_dtype_promotion("standard"):  # of optax's counts
      updates, state = optimizer.update(grad, state, trained)
    return optax.apply_updates(trained, updates), state, value

  for _ in range(3):
    trained, state, value = step(trained, state)
    theirs.zero_grad()
    want = torch.square(model(torch.tensor(x))).sum()
    want.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    theirs.step()
    np.testing.assert_allclose(value, want.item(), rtol=1e-5)
  return lx.combine(trained, rest)

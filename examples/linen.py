"""LoRA on a Flax Linen model, its head trained in full: python examples/linen.py"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lorax_flax as lx


class MLP(nn.Module):
  @nn.compact
  def __call__(self, x_BxD):
    hidden_BxF = nn.tanh(nn.Dense(64, name="up")(x_BxD))
    return nn.Dense(1, name="head")(hidden_BxF)


model, x = MLP(), jax.random.normal(jax.random.key(2), (256, 8))
params = model.init(jax.random.key(0), x)["params"]
apply_fn = lambda params, x: model.apply({"params": params}, x)

config = lx.LoraConfig(targets=["up"], rank=4, alpha=8, tuned="head")
lora = lx.adapt(apply_fn, config)
print(lora.plan(params, x))
adapter = lora.init(jax.random.key(1), params, x)

y = jnp.sin(3 * x[:, :1])
trained, frozen = lx.partition(adapter, lx.trainable_mask(adapter))
optimizer = optax.adam(1e-2)
state = optimizer.init(trained)


@jax.jit
def step(trained, state, x, y):
  def loss(trained):
    outputs = lora.apply(params, lx.combine(trained, frozen), x)
    return jnp.mean((outputs - y) ** 2)

  value, grads = jax.value_and_grad(loss)(trained)
  updates, state = optimizer.update(grads, state, trained)
  return optax.apply_updates(trained, updates), state, value


for i in range(200):
  trained, state, value = step(trained, state, x, y)
  if i % 50 == 0 or i == 199:
    print(f"step {i}: loss {value:.4f}")

merged = lx.merge(params, lx.combine(trained, frozen))  # the same tree as params
print("loss when merged:", f"{jnp.mean((apply_fn(merged, x) - y) ** 2):.4f}")

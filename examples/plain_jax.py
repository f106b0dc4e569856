"""LoRA on a plain function of a params pytree: python examples/plain_jax.py"""

import jax
import jax.numpy as jnp
import optax

import lorax_flax as lx


def mlp(params, x_BxD):
  hidden_BxF = jax.nn.tanh(x_BxD @ params["up"]["w"])
  return hidden_BxF @ params["down"]["w"]


keys = jax.random.split(jax.random.key(0), 3)
params = {
  "up": {"w": jax.random.normal(keys[0], (8, 64)) / 8**0.5},
  "down": {"w": jax.random.normal(keys[1], (64, 1)) / 8},
}
x = jax.random.normal(keys[2], (256, 8))

lora = lx.adapt(mlp, lx.LoraConfig(targets=["up", "down"], rank=4, alpha=8))
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
print("loss when merged:", f"{jnp.mean((mlp(merged, x) - y) ** 2):.4f}")

"""LoRA on a Flax NNX model: python examples/nnx.py"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lorax_flax as lx


class MLP(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(8, 64, rngs=rngs)
    self.down = nnx.Linear(64, 1, rngs=rngs)

  def __call__(self, x_BxD):
    return self.down(nnx.tanh(self.up(x_BxD)))


# An NNX model is a function of its state.
graph, params, rest = nnx.split(MLP(nnx.Rngs(0)), nnx.Param, ...)
apply_fn = lambda params, x: nnx.merge(graph, params, rest)(x)
x = jax.random.normal(jax.random.key(2), (256, 8))

lora = lx.adapt(apply_fn, lx.LoraConfig(targets=["up", "down"], rank=4, alpha=8))
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

merged = lx.merge(params, lx.combine(trained, frozen))  # a state like params
model = nnx.merge(graph, merged, rest)
print("loss when merged:", f"{jnp.mean((model(x) - y) ** 2):.4f}")

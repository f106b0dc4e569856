"""LoRA on a Flax NNX model in training mode: python examples/nnx.py"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lorax_flax as lx


class MLP(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
    self.up = nnx.Linear(8, 64, rngs=rngs)
    self.down = nnx.Linear(64, 1, rngs=rngs)

  def __call__(self, x_BxD):
    return self.down(nnx.tanh(self.up(self.norm(x_BxD))))


graph, params, state = nnx.split(model := MLP(nnx.Rngs(0)), nnx.Param, ...)


def apply_fn(params, state, x):
  # A call in training mode changes its state; copy=True gives it one of its own.
  model = nnx.merge(graph, params, state, copy=True)
  return model(x), nnx.state(model, nnx.Not(nnx.Param))


x = jax.random.normal(jax.random.key(2), (256, 8))
y = jnp.sin(3 * x[:, :1])
lora = lx.adapt(apply_fn, lx.LoraConfig(targets=["up", "down"], rank=4, alpha=8))
print(lora.plan(params, state, x))
adapter = lora.init(jax.random.key(1), params, state, x)
trained, frozen = lx.partition(adapter, lx.trainable_mask(adapter))
opt = (optimizer := optax.adam(1e-2)).init(trained)


@jax.jit
def step(trained, opt, state):
  def loss(trained):
    y_hat, new = lora.apply(params, lx.combine(trained, frozen), state, x)
    return jnp.mean((y_hat - y) ** 2), new

  (value, state), grads = jax.value_and_grad(loss, has_aux=True)(trained)
  updates, opt = optimizer.update(grads, opt, trained)
  return optax.apply_updates(trained, updates), opt, state, value


for i in range(200):
  trained, opt, state, value = step(trained, opt, state)
  if i % 50 == 0 or i == 199:
    print(f"step {i}: loss {value:.4f}")

merged = lx.merge(params, lx.combine(trained, frozen))  # params stay the base, until:
# they hold the model's own Variables, so its update merges them too; do not apply the
# adapter to them again. lx.unmerge gives the base back.
nnx.update(model, merged, state)
model.eval()
print("loss when merged:", f"{jnp.mean((model(x) - y) ** 2):.4f}")

"""LoRA on a Haiku model: python examples/haiku_model.py (needs dm-haiku)"""

import haiku as hk
import jax
import jax.numpy as jnp
import optax

import lorax_flax as lx

mlp = lambda x_BxD: hk.nets.MLP([64, 64, 1], activation=jnp.tanh)(x_BxD)
init, apply_fn = hk.without_apply_rng(hk.transform(mlp))
x = jax.random.normal(jax.random.key(2), (256, 8))
params = init(jax.random.key(0), x)

lora = lx.adapt(apply_fn, lx.LoraConfig(targets=r"mlp/.*/w", rank=4, alpha=8))
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

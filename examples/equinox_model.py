"""LoRA on an Equinox model: python examples/equinox_model.py (needs equinox)"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import lorax_flax as lx

model = eqx.nn.MLP(8, 1, 64, depth=2, activation=jnp.tanh, key=jax.random.key(0))
# Its arrays are the params; the rest of the module goes into the function.
params, static = eqx.partition(model, eqx.is_inexact_array)
apply_fn = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
x = jax.random.normal(jax.random.key(2), (256, 8))

lora = lx.adapt(apply_fn, lx.LoraConfig(targets=r"layers/\d+/weight", rank=4, alpha=8))
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

merged = eqx.combine(lx.merge(params, lx.combine(trained, frozen)), static)
print("loss when merged:", f"{jnp.mean((jax.vmap(merged)(x) - y) ** 2):.4f}")

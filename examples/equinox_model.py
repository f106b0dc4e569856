"""LoRA on an Equinox model: python examples/equinox_model.py (needs equinox)"""

import equinox as eqx
import jax
import jax.numpy as jnp

import lorax_flax as lx

model = eqx.nn.MLP(8, 1, 64, depth=2, activation=jnp.tanh, key=jax.random.key(0))
# Its arrays are the params; the rest of the module goes into the function.
params, static = eqx.partition(model, eqx.is_inexact_array)
apply_fn = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
x = jax.random.normal(jax.random.key(2), (256, 8))

lora = lx.adapt(apply_fn, lx.LoraConfig(targets=r"layers/\d+/weight", rank=4, alpha=8))
print(lora.plan(params, x))

y = jnp.sin(3 * x[:, :1])
loss = lambda outputs, batch: jnp.mean((outputs - batch[-1]) ** 2, axis=-1)
fitted = lx.fit(lora, params, [(x, y)], loss, steps=200, learning_rate=1e-2)
for line in fitted.history:
  print(f"step {line['step']}: loss {line['train/loss']:.4f}")

merged = eqx.combine(lx.merge(params, fitted.adapter), static)
print("loss when merged:", f"{jnp.mean((jax.vmap(merged)(x) - y) ** 2):.4f}")

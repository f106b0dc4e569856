"""LoRA on a Haiku model: python examples/haiku_model.py (needs dm-haiku)"""

import haiku as hk
import jax
import jax.numpy as jnp

import lorax_flax as lx

mlp = lambda x_BxD: hk.nets.MLP([64, 64, 1], activation=jnp.tanh)(x_BxD)
init, apply_fn = hk.without_apply_rng(hk.transform(mlp))
x = jax.random.normal(jax.random.key(2), (256, 8))
params = init(jax.random.key(0), x)

lora = lx.adapt(apply_fn, lx.LoraConfig(targets=r"mlp/.*/w", rank=4, alpha=8))
print(lora.plan(params, x))

y = jnp.sin(3 * x[:, :1])
loss = lambda outputs, batch: jnp.mean((outputs - batch[-1]) ** 2, axis=-1)
fitted = lx.fit(lora, params, [(x, y)], loss, steps=200, learning_rate=1e-2)
for line in fitted.history:
  print(f"step {line['step']}: loss {line['train/loss']:.4f}")

merged = lx.merge(params, fitted.adapter)  # the same tree as params
print("loss when merged:", f"{jnp.mean((apply_fn(merged, x) - y) ** 2):.4f}")

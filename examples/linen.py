"""LoRA on a Flax Linen model, its head trained in full: python examples/linen.py"""

import flax.linen as nn
import jax
import jax.numpy as jnp

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

y = jnp.sin(3 * x[:, :1])
loss = lambda outputs, batch: jnp.mean((outputs - batch[-1]) ** 2, axis=-1)
fitted = lx.fit(lora, params, [(x, y)], loss, steps=200, learning_rate=1e-2)
for line in fitted.history:
  print(f"step {line['step']}: loss {line['train/loss']:.4f}")

merged = lx.merge(params, fitted.adapter)  # the same tree as params
print("loss when merged:", f"{jnp.mean((apply_fn(merged, x) - y) ** 2):.4f}")

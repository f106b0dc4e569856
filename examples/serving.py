"""Adapters in use: swapped, mixed in a batch, merged: python examples/serving.py"""

import flax.linen as nn
import jax
import jax.numpy as jnp

import lorax_flax as lx


class MLP(nn.Module):
  @nn.compact
  def __call__(self, x_BxD):
    return nn.Dense(3, name="down")(nn.relu(nn.Dense(64, name="up")(x_BxD)))


model, x = MLP(), jax.random.normal(jax.random.key(2), (4, 8))
params = model.init(jax.random.key(0), x)["params"]
apply_fn = lambda params, x: model.apply({"params": params}, x)
lora = lx.adapt(apply_fn, lx.LoraConfig(targets=["up", "down"], rank=4))


def adapter_of(seed):
  """Stands for a trained adapter: every leaf is moved, so its delta is not zero."""
  adapter = lora.init(jax.random.key(seed), params, x)
  return jax.tree.map(lambda leaf: leaf + 0.1, adapter)


french, german = adapter_of(1), adapter_of(2)

# Swapped: the adapter is an argument, so the second call compiles nothing.
serve = jax.jit(lora.apply)
outputs = {"french": serve(params, french, x), "german": serve(params, german, x)}
print("swapped: programs compiled:", serve._cache_size())

# Mixed: every row of a batch has its own adapter, and the base is there once. Slots
# hold adapters of any rank up to the largest; one is put in place of another, or a row
# takes none (-1), and nothing is compiled again.
many = lx.many(lora, capacity=8, max_rank=16)
slots = many.empty(params, french)
slots = many.put(params, slots, 0, french)
slots = many.put(params, slots, 1, german)
rows = jnp.array([0, 1, 1, 0])  # french, german, german, french
mixed = jax.jit(many.apply)(params, slots, rows, x)
alone = jnp.where(rows[:, None] == 0, outputs["french"], outputs["german"])
print("mixed: largest difference:", f"{jnp.abs(mixed - alone).max():.0e}")

# Merged: an ordinary params tree, with no added work; unmerge takes it back.
merged = lx.merge(params, french)
print("merged:", jnp.allclose(apply_fn(merged, x), outputs["french"], atol=1e-4))
base = lx.unmerge(merged, french)
same = jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-5), base, params)
print("unmerged:", all(jax.tree.leaves(same)))

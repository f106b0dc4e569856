"""A compiled step writes into the cache that it is given."""

import re

import jax
import jax.numpy as jnp
import pytest

import lorax_flax as lx
from lorax_flax.models import registry
from lorax_flax.serve import decoder

CONFIG = {
  "model_type": "llama",
  "vocab_size": 37,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
}


@pytest.mark.parametrize("scan", [False, True])
def test_a_step_gives_back_the_memory_of_the_cache_it_was_given(scan):
  model = registry.outline(CONFIG, scan=scan)
  cache = jax.eval_shape(lambda: model.blank_cache(3, 501))
  params, ids = model.family.shapes(model.module), jax.ShapeDtypeStruct((3,), jnp.int32)
  program = decoder.decoder_of(model).step.lower(params, ids, cache).compile()
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes == size
  if not scan:  # A scan slices a layer's keys and values out of the stack.
    text = program.as_text()
    assert not re.findall(r"f32\[3,2,501,8\]\S* (copy|transpose)\(.*", text)
    assert memory.temp_size_in_bytes < size / 4  # one layer's keys


def test_a_step_of_rows_with_adapters_of_their_own_does_so_too():
  model = registry.outline(CONFIG)
  cache = jax.eval_shape(lambda: model.blank_cache(3, 501))
  params, ids = model.family.shapes(model.module), jax.ShapeDtypeStruct((3,), jnp.int32)
  lora = lx.adapt(
    lambda params, ids: model.module.apply({"params": params}, ids, jnp.ones_like(ids)),
    lx.LoraConfig(),
  )
  ids_1x4 = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  adapter = jax.eval_shape(lora.init, jax.random.key(0), params, ids_1x4)
  many = lx.many(lora, capacity=4, max_rank=8)
  slots = jax.eval_shape(lambda: many.empty(params, adapter))
  made = decoder.decoder_of(model, decoder.many(model))
  program = made.step.lower((params, slots, ids), ids, cache).compile()
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes == size
  text = program.as_text()
  assert not re.findall(r"f32\[3,(?:1,)?2,501,8\]\S* (copy|transpose)\(.*", text)
  assert memory.temp_size_in_bytes < size / 4

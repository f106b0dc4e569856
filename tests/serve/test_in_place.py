"""A compiled step writes into the cache that it is given."""

import re

import jax
import jax.numpy as jnp
import pytest

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

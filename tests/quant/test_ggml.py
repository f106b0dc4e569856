"""Blocks of GGUF files: the codes and values of the gguf package."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_flax import LoraxError, quant
from lorax_flax.quant.ggml import Ggml

OUT, IN = 6, 512
GGML = [name for name, kind in quant.FORMATS.items() if issubclass(kind, Ggml)]
MADE = [name for name in GGML if name in quant.CHOICES]


def rows(name, *shape):
  """Bytes of random blocks, their float16s finite."""
  kind, draws = quant.FORMATS[name], np.random.default_rng(3)
  found = draws.integers(0, 256, (*shape, IN // kind.block, 0), dtype=np.uint8)
  for dtype, n in kind.parts.values():
    field = (*shape, IN // kind.block, n)
    if dtype == jnp.float16:
      part = draws.standard_normal(field).astype(np.float16).view(np.uint8)
    else:
      part = draws.integers(0, 256, field, dtype=np.uint8)
    found = np.concatenate([found, part], -1)
  return found.reshape(*shape, -1)


@pytest.mark.parametrize("name", GGML)
def test_values_are_those_of_the_gguf_package(name):
  kind, data = gguf.GGMLQuantizationType[name.upper()], rows(name, 2, OUT)
  expected = np.swapaxes(gguf.quants.dequantize(data, kind), -1, -2)
  leaf = quant.FORMATS[name].of_rows(data, jnp.dtype("float32"))
  assert leaf.nbytes == data.nbytes
  assert leaf.shape == (2, IN, OUT)
  np.testing.assert_allclose(leaf.dense(), expected, rtol=1e-6, atol=1e-5)
  abstract = quant.FORMATS[name].struct(leaf.shape, leaf.dtype)
  assert abstract.dtype == leaf.dtype
  for field, array in abstract.arrays().items():
    ours = leaf.arrays()[field]
    assert (array.shape, array.dtype) == (ours.shape, ours.dtype)


@pytest.mark.parametrize("name", MADE)
def test_codes_are_those_of_the_gguf_package(name):
  w = np.random.default_rng(1).standard_normal((OUT, IN)).astype(np.float32)
  w[2, 64:128] = 0
  w[3, 64:128] = 0.5
  data = gguf.quants.quantize(w, gguf.GGMLQuantizationType[name.upper()])
  expected = quant.FORMATS[name].of_rows(data, jnp.dtype("float32"))
  for field, array in quant.quantize(w.T, name).arrays().items():
    np.testing.assert_array_equal(array, expected.arrays()[field], field)


def test_what_is_only_read_is_not_made():
  assert {*GGML} - {*MADE} == {"q4_k", "q6_k"}
  with pytest.raises(LoraxError, match="Q4_K blocks are read from GGUF files"):
    quant.quantize(jnp.ones((256, 4)), "q4_k")

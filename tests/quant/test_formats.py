"""The formats' codes and values: those of bitsandbytes 0.50.2 on a CPU, by digest."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lorax_flax import LoraxError, quant
from lorax_flax.hub.checkpoints import quantized
from lorax_flax.quant import nf4

OUT, IN = 40, 512


def weight():
  """A torch weight, (out, in), of exact numbers, with a block of zeros."""
  i = np.arange(OUT * IN).reshape(OUT, IN)
  w = (i * 7919 % 10007 - 5003) / 4096 * (1 + i // IN)
  w[3, 64:128] = 0
  return w.astype(np.float32)


def digest(x):
  return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:16]


def test_code_books_are_bitsandbytes():
  assert digest(weight()) == "20b354d222b0740b"  # What the digests below are of.
  assert digest(nf4.CODE) == "8501941daa1b8a90"
  assert digest(nf4.DYNAMIC) == "e732639a65f497b4"


def test_nf4_single_is_bitsandbytes():
  leaf = quant.quantize(weight().T, "nf4_single")
  assert np.ravel(leaf.codes)[:8].tolist() == [13, 148, 31, 200, 65, 236, 115, 30]
  assert digest(leaf.codes) == "1a977fd504f93340"
  assert digest(leaf.absmax.T) == "31abae4d8f0631bf"
  assert digest(leaf.dense().T) == "5105c57bbc4e6f42"
  half = quant.quantize(jnp.asarray(weight().T, jnp.bfloat16), "nf4_single")
  assert digest(half.codes) == "492970dd639df942"
  assert half.dense().dtype == half.dtype == jnp.bfloat16
  assert digest(np.asarray(half.dense(), np.float32).T) == "8af1fba12c70adc4"


def test_double_quantised_nf4_is_bitsandbytes():
  leaf = quant.quantize(weight().T, "nf4")
  assert digest(leaf.codes) == "1a977fd504f93340"
  assert digest(leaf.scales.T) == "c33aacb369f024c3"
  # The mean of numbers depends on their order, in the last bit.
  theirs = {"scales_absmax": [24.741186141967773, 24.116235733032227]}
  theirs |= {"mean": [24.741186141967773]}
  theirs = {name: jnp.float32(x) for name, x in theirs.items()}
  for name, x in theirs.items():
    np.testing.assert_allclose(getattr(leaf, name), x, rtol=4e-7)
  same = dataclasses.replace(leaf, **theirs)
  assert digest(same.dense().T) == "ced6cfa71dae0edc"


def test_int8_is_bitsandbytes():
  leaf = quant.quantize(jnp.asarray(weight().T, jnp.float16), "int8")
  assert digest(leaf.codes) == "c25f30423efd4fd2"
  assert digest(leaf.absmax) == "ac477b579bd84b9c"


def test_fp8_is_torchs():
  w = weight()
  leaf, largest = quant.quantize(w.T, "fp8"), np.abs(w).max(1, keepdims=True)
  theirs = torch.tensor(w * (np.float32(448) * (np.float32(1) / largest)))
  theirs = theirs.clip(-448, 448).to(torch.float8_e4m3fn)
  np.testing.assert_array_equal(leaf.codes.view(jnp.uint8), theirs.view(torch.uint8))
  expected = theirs.to(torch.float32).numpy() * (largest * np.float32(1 / 448))
  np.testing.assert_array_equal(leaf.dense(), expected.T)


BOUNDS = {"int8": 0.501 / 127, "int4": 0.501 / 7, "nf4": 0.2, "nf4_single": 0.16}
# A step of these may be cut by its float16, and Q4_0 reaches no further than 7 of 8.
BOUNDS |= {"fp8": 0.5 / 14, "q8_0": 0.57 / 127, "q4_0": 0.126, "q4_1": 0.07}
SMALLER = {"int8": 3.9, "fp8": 3.9, "q8_0": 3.7, "q4_1": 6.3}
MADE = [name for name in quant.CHOICES if name != quant.AS_STORED]


@pytest.mark.parametrize("name", MADE)
def test_errors_are_within_half_a_step(name):
  w = weight().T
  leaf = quant.quantize(w, name)
  assert (leaf.shape, leaf.size, leaf.ndim) == (w.shape, w.size, w.ndim)
  assert leaf.nbytes < w.nbytes / SMALLER.get(name, 6.9)
  blocks = np.abs(w).reshape(-1, IN if name in ("int8", "fp8") else 64, OUT).max(1)
  error = np.abs(leaf.dense() - w).reshape(
    -1, IN if name in ("int8", "fp8") else 64, OUT
  )
  assert (error.max(1) <= BOUNDS[name] * blocks + 0.6 * (name == "nf4") + 1e-6).all()


@pytest.mark.parametrize("name", MADE)
def test_places_of_a_stack_are_quantised_by_themselves(name):
  kernels = jax.random.normal(jax.random.key(0), (2, 3, 128, 48))
  leaf, one = quant.quantize(kernels, name), quant.quantize(kernels[1, 2], name)
  assert leaf.shape == kernels.shape
  for array, alone in zip(jax.tree.leaves(leaf), jax.tree.leaves(one), strict=True):
    np.testing.assert_allclose(array[1, 2], alone, rtol=1e-6)
  abstract = quant.quantize(jax.ShapeDtypeStruct(kernels.shape, jnp.float32), name)
  assert jax.tree.structure(abstract) == jax.tree.structure(leaf)
  assert abstract.shape == kernels.shape


@pytest.mark.parametrize("name", ["nf4", "int4", "int8", "q8_0"])
def test_a_leaf_is_made_of_some_outputs_at_a_time(name, monkeypatch):
  kernels = np.asarray(jax.random.normal(jax.random.key(0), (2, 128, 50)))
  monkeypatch.setattr(quantized, "_BLOCK", 16 * 128 * 4)  # The last one has two.
  sizes = []

  def read(block):
    part = kernels[tuple(slice(*ends) for ends in block)]
    sizes.append(part.shape)
    return part

  shape = jax.ShapeDtypeStruct(kernels.shape, kernels.dtype)
  filled = quantized.fill(quant.quantize(shape, name), read)
  assert sizes == [(1, 128, n) for n in (16, 16, 16, 2)] * 2
  at_once = quant.quantize(kernels, name)
  assert jax.tree.structure(filled) == jax.tree.structure(at_once)
  for array, full in zip(
    jax.tree.leaves(filled), jax.tree.leaves(at_once), strict=True
  ):
    assert isinstance(array, np.ndarray)
    np.testing.assert_allclose(array, full, rtol=1e-6)


def test_errors_name_the_format_and_the_axis():
  with pytest.raises(LoraxError, match="did you mean 'nf4'"):
    quant.quantize(jnp.ones((64, 8)), "nf5")
  with pytest.raises(LoraxError, match="is 96, no multiple of the block of 64"):
    quant.quantize(jnp.ones((96, 8)), "int4")
  with pytest.raises(LoraxError, match=r"\(…, in, out\)"):
    quant.quantize(jnp.ones(64), "int8")
  with pytest.raises(LoraxError, match=r"lx\.adapt"):
    jnp.asarray(quant.quantize(jnp.ones((64, 8)), "int8"))

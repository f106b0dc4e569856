"""Quantised weights: a format a file, one protocol, and the table `FORMATS`.

A leaf of the base may be a `Quantized`; the transform of `lx.adapt` keeps it as it is
and forms the dense kernel at each product alone.

>>> import jax.numpy as jnp
>>> from lorax_flax import quant
>>> leaf = quant.quantize(jnp.eye(64), "nf4")
>>> leaf.shape, leaf.codes.shape, bool((leaf.dense() == jnp.eye(64)).all())
((64, 64), (64, 32), True)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lorax_flax.errors import check_known
from lorax_flax.quant import tiles
from lorax_flax.quant.deferred import Deferred, realized
from lorax_flax.quant.fp8 import Fp8
from lorax_flax.quant.int4 import Int4
from lorax_flax.quant.int8 import Int8
from lorax_flax.quant.nf4 import NF4, DoubleNF4
from lorax_flax.quant.q4_0 import Q4_0
from lorax_flax.quant.q4_1 import Q4_1
from lorax_flax.quant.q4_k import Q4_K
from lorax_flax.quant.q6_k import Q6_K
from lorax_flax.quant.q8_0 import Q8_0
from lorax_flax.quant.quantized import Quantized, dense, is_quantized

FORMATS: dict[str, type[Quantized]] = {
  "int8": Int8,
  "int4": Int4,
  "nf4": DoubleNF4,
  "nf4_single": NF4,
  "fp8": Fp8,
  "q8_0": Q8_0,
  "q4_0": Q4_0,
  "q4_1": Q4_1,
  "q4_k": Q4_K,
  "q6_k": Q6_K,
}
# The format of each weight in a GGUF file.
AS_STORED = "as_stored"
# What a base may be loaded as: formats that are made of numbers, or found.
CHOICES = (
  *(n for n, kind in FORMATS.items() if "of_matrices" in vars(kind)),
  AS_STORED,
)
# Kernels of products by platform, of what their `takes` says. There no dense kernel is.
KERNELS: dict[str, Any] = {"tpu": tiles}

__all__ = [
  "AS_STORED",
  "CHOICES",
  "FORMATS",
  "KERNELS",
  "Deferred",
  "Quantized",
  "dense",
  "is_quantized",
  "name_of",
  "quantize",
  "realized",
]


def quantize(kernel: Any, name: str) -> Quantized:
  """A kernel in a format of `FORMATS`; it keeps its dtype.

  Args:
    kernel: (*stack, in, out), floating-point; or its ShapeDtypeStruct, for that of the
      leaf. Each place of the stack is quantised by itself.

  Raises:
    LoraxError: an unknown format; a shape that it does not take.
  """
  check_known("quant", name, FORMATS)
  FORMATS[name].check(tuple(kernel.shape))
  if isinstance(kernel, jax.ShapeDtypeStruct):
    return FORMATS[name].struct(kernel.shape, kernel.dtype)
  return _quantize(kernel, name=name)


@functools.partial(jax.jit, static_argnames="name")
def _quantize(kernel: jax.Array, name: str) -> Quantized:
  m = kernel.mT.astype(jnp.float32)
  return FORMATS[name].of_matrices(m, kernel.dtype)


def name_of(leaf: Quantized) -> str:
  """The format's name."""
  return next(name for name, kind in FORMATS.items() if type(leaf) is kind)

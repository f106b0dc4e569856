"""FLOPs of kernels whose products neither a jaxpr nor a program's text shows."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from lorax_flax import ragged
from lorax_flax.quant import tiles
from lorax_flax.quant.four_bit import FourBit

Shapes = Sequence[tuple[int, ...]]


class Products(NamedTuple):
  """Numbers of a kernel's products, which have the same size.

  Attributes:
    executed: by the kernel, with logits that it computes again.
    needed: of them.
    flops: FLOPs of one product, by the shapes of the floating-point operands.
  """

  executed: int
  needed: int
  flops: Callable[[Shapes], int]


def _queries_by_keys(shapes: Shapes) -> int:
  queries, keys = shapes[:2]  # (…, H, T, K) and (…, G, S, K)
  return 2 * math.prod(queries) * keys[-2]


def _rows_by_weights(shapes: Shapes) -> int:
  x, steps = shapes
  return 2 * math.prod(x[:-1]) * math.prod(steps) * FourBit.block


# By the beginning of a kernel's name. Blocks of which causality leaves nothing are
# skipped by the kernel and counted here, as they are where no kernel is used.
ATTENTION = {
  "splash_mha_fwd": Products(2, 2, _queries_by_keys),
  "splash_mha_dkv": Products(4, 2, _queries_by_keys),
  "splash_mha_dq": Products(3, 2, _queries_by_keys),
}
KERNELS = {**ATTENTION, tiles.NAME: Products(1, 1, _rows_by_weights)}


def known(name: str, table: Mapping[str, Products] = KERNELS) -> str | None:
  """The key of a table for an instruction's or a call's name; None for any other."""
  return next((start for start in table if name.startswith(start)), None)


def products(name: str) -> Products | None:
  """The products of a kernel; None for any other name."""
  start = known(name)
  return None if start is None else KERNELS[start]


_RAGGED = re.compile(rf"{ragged.SCOPE}(\d+)")


def ragged_rows(source: str) -> int | None:
  """Number of rows that a ragged product is expected to compute; None for others.

  Args:
    source: name stack of the kernel.
  """
  found = _RAGGED.search(source)
  return None if found is None else int(found[1])

"""FLOPs of kernels whose products neither a jaxpr nor a program's text shows."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from lorax_flax import ragged


class Products(NamedTuple):
  """Numbers of products of every query with every key, or of what has their size.

  Attributes:
    executed: by the kernel, with logits that it computes again.
    needed: of them.
  """

  executed: int
  needed: int


# By the beginning of a kernel's name. Blocks of which causality leaves nothing are
# skipped by the kernel and counted here, as they are where no kernel is used.
ATTENTION = {
  "splash_mha_fwd": Products(2, 2),
  "splash_mha_dkv": Products(4, 2),
  "splash_mha_dq": Products(3, 2),
}


def known(name: str) -> str | None:
  """The key of `ATTENTION` of an instruction's or a call's name; None for any other."""
  return next((start for start in ATTENTION if name.startswith(start)), None)


def products(name: str) -> Products | None:
  """The products of a kernel of attention; None for any other name."""
  start = known(name)
  return None if start is None else ATTENTION[start]


def flops(shapes: Sequence[tuple[int, ...]]) -> int:
  """FLOPs of one product, of the shapes of a kernel's floating-point operands."""
  queries, keys = shapes[:2]  # (…, H, T, K) and (…, G, S, K)
  return 2 * math.prod(queries) * keys[-2]


_RAGGED = re.compile(rf"{ragged.SCOPE}(\d+)")


def ragged_rows(source: str) -> int | None:
  """Number of rows that a ragged product is expected to compute; None for others.

  Args:
    source: name stack of the kernel.
  """
  found = _RAGGED.search(source)
  return None if found is None else int(found[1])

"""Leaves that are made at each use: models that no memory has to hold at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lorax_flax.quant.quantized import dense, is_quantized


@dataclass(frozen=True, eq=False)
class Deferred:
  """A leaf of a params tree that is made at each use, and not kept.

  It stands for an array wherever one is taken: `dense` and `jnp.asarray` make it. What
  looks at shapes alone costs nothing.

  Attributes:
    like: the leaf, of ShapeDtypeStructs; quantised where the leaf is.
    make: () -> the leaf.
  """

  like: Any
  make: Callable[[], Any]

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.like.shape)

  @property
  def dtype(self) -> Any:
    return self.like.dtype

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    return self.like.size

  def dense(self) -> jax.Array:
    return dense(self.make())

  def __jax_array__(self) -> jax.Array:
    return self.dense()

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return np.array(self.dense(), dtype, copy=copy)


def realized(tree: Any) -> Any:
  """The tree with its deferred leaves made, each of them once.

  The largest are made first, while there is room for what making them takes.
  """
  leaves = jax.tree.leaves(tree, is_leaf=is_quantized)
  structure: Any = jax.tree.structure(tree, is_leaf=is_quantized)
  deferred = {id(x): x for x in leaves if isinstance(x, Deferred)}
  largest_first = sorted(deferred.values(), key=lambda x: -x.size)
  made = {id(x): jax.block_until_ready(x.make()) for x in largest_first}
  return structure.unflatten([made.get(id(x), x) for x in leaves])

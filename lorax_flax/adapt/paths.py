"""Slash paths: the names of leaves, the same for dicts, NNX states and dataclasses."""

import zlib
from typing import Any

import jax
from jax.tree_util import GetAttrKey, keystr

from lorax_flax.errors import LoraxError
from lorax_flax.quant import is_quantized

PyTree = Any


def flatten(tree: PyTree) -> dict[str, Any]:
  """Leaves by slash path ("encoder/layer_0/query/kernel"), in the tree's order.

  The `.value` by which a box holds an array (nnx.Variable, nn.Partitioned) is not part
  of the name; the field `value` of a node that has other leaves too is. A quantised
  weight is one leaf.

  Raises:
    LoraxError: two leaves have the same path, as where a key has a slash in it.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
  places = [place for place, _ in leaves]
  first: dict[str, Any] = {}
  for i, place in enumerate(places):
    name = _name(place, places[max(i - 1, 0) : i] + places[i + 1 : i + 2])
    if name in first:
      raise LoraxError(
        f"two leaves have the path {name!r}: {keystr(first[name])} and {keystr(place)}"
      )
    first[name] = place
  return dict(zip(first, (leaf for _, leaf in leaves), strict=True))


def _name(place, neighbours) -> str:
  """Slash path of a leaf, given the places of the leaves before and after it."""
  node, last = place[:-1], place[-1:]
  is_alone = all(other[: len(node)] != node for other in neighbours)
  if is_alone and last == (GetAttrKey("value"),):
    place = node
  return "/".join(keystr((key,), simple=True) for key in place)


def is_array(x: Any) -> bool:
  """True for arrays, their shapes, and objects in their place (quantised ones)."""
  return hasattr(x, "shape") and hasattr(x, "dtype")


def arrays(tree: PyTree) -> dict[str, Any]:
  """The leaves that are arrays, by path; numbers and functions are static."""
  return {path: leaf for path, leaf in flatten(tree).items() if is_array(leaf)}


def map_with_path(fn, tree: PyTree, *rest: PyTree) -> PyTree:
  """`fn(path, leaf, …)` over the leaves of trees alike, `path` being a slash path."""
  structure: Any = jax.tree.structure(tree, is_leaf=is_quantized)
  columns = (structure.flatten_up_to(other) for other in rest)
  named = flatten(tree)
  results = map(fn, named.keys(), named.values(), *columns)
  return jax.tree.unflatten(structure, results)


def beside(path: str, name: str) -> str:
  """The path of a leaf of this name in the same module."""
  return "/".join([*path.split("/")[:-1], name])


def path_key(key: jax.Array, path: str) -> jax.Array:
  """A key that depends on (key, path) alone, on every machine and Python."""
  return jax.random.fold_in(key, zlib.crc32(path.encode()))

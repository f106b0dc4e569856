"""Slash paths: the names of leaves, the same for dicts, NNX states and dataclasses."""

import zlib
from typing import Any

import jax

PyTree = Any


def path_str(key_path) -> str:
  """A key path as "encoder/layer_0/query/kernel".

  The `.value` by which Flax's boxes hold an array (nnx.Variable, nn.Partitioned) is not
  part of a leaf's name.
  """
  names = [
    jax.tree_util.keystr((k,), simple=True)
    for k in key_path
    if not (isinstance(k, jax.tree_util.GetAttrKey) and k.name == "value")
  ]
  return "/".join(names)


def flatten(tree: PyTree) -> dict[str, Any]:
  """Leaves by slash path, in the tree's order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {path_str(path): leaf for path, leaf in leaves}


def map_with_path(fn, tree: PyTree, *rest: PyTree) -> PyTree:
  """`fn(path, leaf, …)` over the leaves of trees alike, `path` being a slash path."""
  return jax.tree_util.tree_map_with_path(
    lambda p, *leaves: fn(path_str(p), *leaves), tree, *rest
  )


def path_key(key: jax.Array, path: str) -> jax.Array:
  """A key that depends on (key, path) alone, on every machine and Python."""
  return jax.random.fold_in(key, zlib.crc32(path.encode()))

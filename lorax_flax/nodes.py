"""Dataclasses as nodes of pytrees, each class a kind of its own."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
from jax.tree_util import GetAttrKey

Class = TypeVar("Class", bound=type)

_NODES: set[type] = set()


def node(cls: Class) -> Class:
  """Registers a dataclass as a pytree; a decorator above `@dataclass`.

  Fields whose metadata has `static` are part of the structure, the others children. As
  `jax.tree_util.register_dataclass`, by which two classes whose static fields are equal
  have equal structures, of unlike hashes: now and then jit takes the program, or a tree
  the class, of the other one.
  """
  fields = dataclasses.fields(cls)
  names = tuple(f.name for f in fields if f.metadata.get("static"))
  children = tuple(f.name for f in fields if f.name not in names)
  keys = [GetAttrKey(name) for name in children]
  every = (*children, *names)
  of_children, of_names = _getter(children), _getter(names)

  def flatten(x: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return of_children(x), of_names(x)

  def with_keys(x: Any) -> tuple[Any, tuple[Any, ...]]:
    return tuple(zip(keys, of_children(x), strict=True)), of_names(x)

  def unflatten(structure: tuple[Any, ...], values: Iterable[Any]) -> Any:
    return cls(**dict(zip(every, (*values, *structure), strict=True)))

  jax.tree_util.register_pytree_with_keys(cls, with_keys, unflatten, flatten)
  _NODES.add(cls)
  return cls


def is_node(cls: type) -> bool:
  """True for a class that `node` has registered, and for none that inherits from it."""
  return cls in _NODES


def _getter(names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
  """The function of an object that gives its attributes of these names, a tuple."""
  if len(names) > 1:
    return operator.attrgetter(*names)
  return lambda x: tuple(getattr(x, name) for name in names)

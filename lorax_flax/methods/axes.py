"""The axes that a leaf of a delta carries, and the shape that follows from them."""

import math
from collections.abc import Mapping, Sequence

Shape = tuple[int, ...]
# A leaf's axes: those of the base's leaf by number, the method's own by name.
LeafAxes = tuple[int | str, ...]


def by_role(roles: Sequence[str]) -> dict[str, tuple[int, ...]]:
  """A kernel's axes by each name that a declaration may have for them."""
  found = {
    role: tuple(axis for axis, r in enumerate(roles) if r == role)
    for role in ("stack", "in", "out")
  }
  return {**found, "kernel": tuple(range(len(roles)))}


def fans(shape: Shape, roles: Sequence[str]) -> tuple[int, int]:
  """The number of inputs and of outputs of a kernel."""
  axes = by_role(roles)
  fan_in, fan_out = (math.prod(shape[i] for i in axes[role]) for role in ("in", "out"))
  return fan_in, fan_out


def resolved(names: Sequence[str], kernel: Mapping[str, Sequence[int]]) -> LeafAxes:
  """Declared names as axes; a name that `kernel` lacks is an axis of the method's."""
  return tuple(axis for name in names for axis in kernel.get(name, (name,)))


def shape_of(
  axes: LeafAxes,
  base: Shape,
  sizes: Mapping[str, int],
  resized: Mapping[int, int] | None = None,
) -> Shape:
  """The shape of a leaf with these axes.

  Args:
    base: shape of the base's leaf.
    sizes: of the method's own axes.
    resized: axes of the base whose size is another in this leaf: the layers adapted.
  """
  lengths = {**dict(enumerate(base)), **(resized or {})}
  return tuple(sizes[x] if isinstance(x, str) else lengths[x] for x in axes)

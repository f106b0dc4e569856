"""The axes that a leaf of a delta carries, and the shape that follows from them."""

import math
from collections.abc import Mapping, Sequence

from lorax_flax.errors import LoraxError

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


def quotient(
  option: str, n: int, size: int, what: str, shape: Shape, least: int = 1
) -> int:
  """size / n of an option whose value n must divide a kernel's inputs or outputs.

  Args:
    what: "inputs" or "outputs", of which there are `size`.
    shape: the kernel's.
    least: the smallest value that the option may have.

  Raises:
    LoraxError: it does not divide them; the message has the nearest value that does.
  """
  if n < least or size % n:
    divisors = [d for d in range(least, size + 1) if size % d == 0]
    near = min(divisors, key=lambda d: abs(d - n))
    raise LoraxError(
      f"{option}={n} does not divide the {size} {what} of a kernel of shape {shape};"
      f" {near} does"
    )
  return size // n


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

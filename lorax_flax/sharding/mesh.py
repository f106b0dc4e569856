"""The mesh of devices, and the sharding of each tensor over it.

Models name the axes of their weights ("embed", "mlp"); one table, `RULES`, maps each
name to the axis of the mesh that it is sharded along. A delta takes its names from its
kernel, so a factor is on the devices of the part of the kernel that it multiplies.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lorax_flax.adapt.paths import PyTree, flatten, map_with_path
from lorax_flax.errors import LoraxError, check_known, listing, unknown
from lorax_flax.methods import Adapter, Delta
from lorax_flax.quant import Quantized, is_quantized
from lorax_flax.sharding import activations as spread

# Logical names of each leaf's axes, by the leaf's slash path. Every axis has a name, so
# that none is replicated because somebody forgot it.
Axes = Mapping[str, tuple[str, ...]]

# One axis of the mesh or several, as a partition spec has them.
MeshAxes = str | tuple[str, ...]

AXES = ("data", "fsdp", "tensor", "expert", "sequence")
# Devices that are next to each other are along the last: there most is sent.
_NEAREST_LAST = ("data", "fsdp", "sequence", "tensor", "expert")

# The axes of the mesh that each logical axis is sharded along; None: replicated.
RULES: dict[str, MeshAxes | None] = {
  "buckets": None,
  "channels": None,
  "choices": None,
  "embed": ("fsdp", "sequence"),
  "expert": "expert",
  "head": None,
  "heads": "tensor",
  "height": None,
  "labels": None,
  "layers": None,
  "mlp": "tensor",
  "pooled": None,
  "positions": None,
  "rank": None,
  "replicated": None,
  "single": None,
  "types": None,
  "vocab": "tensor",
  "width": None,
}


@dataclass(frozen=True)
class MeshConfig:
  """Number of devices along each axis of the mesh; one may be -1: all that are left.

  Attributes:
    data: shards the batch; weights are replicated.
    fsdp: shards the batch too, and each weight: gathered where it is used.
    tensor: shards weights and what is computed with them; nothing is gathered.
    expert: shards the batch too, and the experts of a mixture: each device computes its
      own, for the tokens of all devices along this axis.
    sequence: shards the tokens of each row, whose keys and values are gathered for
      attention, and each weight as fsdp does.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  expert: int = 1
  sequence: int = 1

  def __post_init__(self):
    for name in AXES:
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int):
        raise LoraxError(f"mesh.{name} must be a whole number, not {value!r}")
      if value < 1 and value != -1:
        raise LoraxError(
          f"mesh.{name} is {value}, and must be at least 1, or -1 for what is left"
        )
    open_ended = [f"mesh.{name}" for name in AXES if getattr(self, name) == -1]
    if len(open_ended) > 1:
      raise LoraxError(f"only one axis can be what is left, not {listing(open_ended)}")

  def sizes(self, devices: int) -> tuple[int, ...]:
    """The size of each of AXES on this number of devices.

    Raises:
      LoraxError: the devices do not come out even.
    """
    sizes = [getattr(self, name) for name in AXES]
    known = math.prod(n for n in sizes if n != -1)
    given = " × ".join(f"{name} {n}" for name, n in zip(AXES, sizes, strict=True))
    if devices % known or (-1 not in sizes and devices != known):
      raise LoraxError(
        f"the mesh {given} does not fit {devices} devices: the product of its axes must"
        " be their number (-1 takes what is left)"
      )
    return tuple(devices // known if n == -1 else n for n in sizes)


def make(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh over all devices of all processes, or over these.

  An axis of the mesh may be a part of one of the network's: jax.make_mesh allows that
  on some TPUs alone.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dict(zip(AXES, config.sizes(len(devices)), strict=True))
  arranged = mesh_utils.create_device_mesh(
    [sizes[name] for name in _NEAREST_LAST], devices, allow_split_physical_axes=True
  )
  return Mesh(arranged, _NEAREST_LAST, axis_types=(AxisType.Auto,) * len(AXES))


def describe(mesh: Mesh) -> str:
  """The mesh in a line."""
  axes = spell(mesh.shape)
  return f"{mesh.size} devices: {axes}, in {jax.process_count()} processes"


def spell(sizes: Mapping[str, int]) -> str:
  """The axes of a mesh that have more than one device."""
  return " × ".join(f"{name} {n}" for name, n in sizes.items() if n > 1)


def replicated(mesh: Mesh) -> NamedSharding:
  """Fully replicated sharding."""
  return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
  """Sharding of batches: rows are sharded, tokens are replicated.

  Attention needs every token's mask, and ids are few bytes: models shard what they make
  of them along `sequence`.
  """
  return NamedSharding(mesh, PartitionSpec(spread.ROWS))


def check_batch(mesh: Mesh, name: str, size: int, parts: int = 1) -> None:
  """Raises LoraxError unless each microbatch can be sharded evenly.

  Args:
    parts: number of microbatches.
  """
  ways = spread.num_shards(mesh.shape)
  if size % (parts * ways):
    split = f" in {parts} parts (train.accumulation)" if parts > 1 else ""
    raise LoraxError(
      f"{name} is {size}, and{split} can't be spread evenly over the {ways} devices of"
      " mesh.data × mesh.fsdp × mesh.expert"
    )


def check_length(mesh: Mesh, name: str, length: int) -> None:
  """Raises LoraxError unless rows of this many tokens can be sharded evenly."""
  if length % (ways := mesh.shape["sequence"]):
    raise LoraxError(
      f"{name} is {length}, and can't be split evenly over the {ways} devices of"
      " mesh.sequence"
    )


def replicated_axes(params: PyTree) -> Axes:
  """Names under which no axis of any leaf is sharded."""
  return {path: ("replicated",) * leaf.ndim for path, leaf in flatten(params).items()}


def names_by_path(logical_axes: PyTree) -> Axes:
  """Axis names by path of a tree as `Family.logical_axes` gives it."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(
    logical_axes, is_leaf=lambda x: isinstance(x, PartitionSpec)
  )
  return {
    jax.tree_util.keystr(p, simple=True, separator="/"): tuple(x) for p, x in leaves
  }


def of_params(mesh: Mesh, axes: Axes, params: PyTree) -> PyTree:
  """The sharding of each weight.

  Args:
    axes: names of every leaf's axes.
    params: arrays or ShapeDtypeStructs.

  Raises:
    LoraxError: a leaf without axis names, or a name that `RULES` does not have; an
      axis of the mesh that is there for weights of which this model has none.
  """
  has_experts = any("expert" in _names(axes, path) for path in flatten(params))
  if mesh.shape["expert"] > 1 and not has_experts:
    raise LoraxError(
      f"mesh.expert is {mesh.shape['expert']}, and the model has no experts: mesh.data"
      " and mesh.fsdp are for any model"
    )

  def sharding(path, leaf):
    of = _of_quantized if is_quantized(leaf) else _of_array
    return of(mesh, path, _names(axes, path), leaf)

  return map_with_path(sharding, params)


def _of_array(mesh: Mesh, path: str, names, leaf: Any) -> NamedSharding:
  return _sharding(mesh, path, names, leaf.shape)


def _of_quantized(mesh: Mesh, path: str, names, leaf: Quantized) -> Quantized:
  """Shardings of a leaf's arrays, along the axes along which the kernel's would be."""
  *stack, fan_in, fan_out = (a for a, _, _ in _shards(mesh, path, names, leaf.shape))
  along = {"in": fan_in, "out": fan_out, None: None}
  found: dict[str, Any] = {}
  for name, array in leaf.arrays().items():
    spec = [*stack, *(along[axis] for axis in leaf.axes[name])]
    for axis, size in zip(spec, array.shape, strict=True):
      if axis is not None and size % _ways(mesh, axis):
        raise LoraxError(
          f"{path!r} of shape {leaf.shape} is quantised, and the {size} of its {name}"
          f" can't be split into the {_ways(mesh, axis)} of {_spelled(axis)}"
        )
    found[name] = NamedSharding(mesh, PartitionSpec(*spec))
  return replace(leaf, **found)


def of_adapter(mesh: Mesh, axes: Axes, adapter: Adapter) -> Adapter:
  """The adapter's tree with each leaf's sharding, inherited from its kernel's.

  Args:
    axes: names of the base's axes.

  Raises:
    LoraxError: as `of_params`.
  """
  return {path: _of_delta(mesh, path, delta, axes) for path, delta in adapter.items()}


def _of_delta(mesh: Mesh, path: str, delta: Delta, axes: Axes) -> Delta:
  """A delta's shardings: its own axes are replicated, the kernel's as the kernel's."""
  names = _names(axes, path)
  found = {}
  for name, leaf in delta.leaves().items():
    own = [names[x] if isinstance(x, int) else "rank" for x in delta.leaf_axes(name)]
    found[name] = _sharding(mesh, f"{path}:{name}", own, leaf.shape)
  return replace(delta, **found)


def _names(axes: Axes, path: str) -> tuple[str, ...]:
  check_known("path with named axes", path, axes)
  return axes[path]


def _sharding(mesh: Mesh, path: str, names, shape) -> NamedSharding:
  if len(names) != len(shape):
    raise LoraxError(
      f"{path!r} of shape {tuple(shape)} has {len(shape)} axes, and names for"
      f" {len(names)}: {tuple(names)}. A model names every axis of every weight"
    )
  spec = [axis for axis, _, _ in _shards(mesh, path, names, shape)]
  while spec and spec[-1] is None:
    spec.pop()
  return NamedSharding(mesh, PartitionSpec(*spec))


def _shards(
  mesh: Mesh, path: str, names, shape
) -> Iterator[tuple[MeshAxes | None, MeshAxes, str]]:
  """Yields, for each axis, the mesh axes that shard it, those that should, and why they
  do not."""
  used: set[str] = set()
  for name, size in zip(names, shape, strict=True):
    if name not in RULES:
      raise LoraxError(
        f"no rule says how to shard axis {name!r} of {path!r}: "
        f"{unknown('logical axis', str(name), RULES)}"
      )
    axes = [axis for axis in _names_of(RULES[name]) if mesh.shape[axis] > 1]
    axis: MeshAxes = axes[0] if len(axes) == 1 else tuple(axes)
    if not axes:
      yield None, "", ""
    elif not used.isdisjoint(axes):
      taken = " and ".join(x for x in axes if x in used)
      yield None, axis, f"{taken} shards another of its axes"
    elif size % (ways := _ways(mesh, axis)):
      yield None, axis, f"{name} of {size} can't be split into {ways}"
    else:
      used.update(axes)
      yield axis, axis, ""


def _names_of(axis: MeshAxes | None) -> tuple[str, ...]:
  return (axis,) if isinstance(axis, str) else axis or ()


def _ways(mesh: Mesh, axis: MeshAxes) -> int:
  return spread.num_shards(mesh.shape, _names_of(axis))


def _spelled(axis: MeshAxes) -> str:
  return " × ".join(f"mesh.{name}" for name in _names_of(axis))


def not_sharded(mesh: Mesh, axes: Axes, params: PyTree) -> list[str]:
  """Lines with the weights that are not sharded although a rule names an axis."""
  found: dict[tuple[MeshAxes, str], list[str]] = {}
  for path, leaf in flatten(params).items():
    for axis, ruled, why in _shards(mesh, path, _names(axes, path), leaf.shape):
      if axis is None and ruled:
        found.setdefault((ruled, why), []).append(path)
  return [
    f"not sharded along {_spelled(axis)}, since {why}: {listing(paths, most=2)}"
    for (axis, why), paths in found.items()
  ]


def abstract(shapes: PyTree, shardings: PyTree) -> PyTree:
  """ShapeDtypeStructs of a tree of shapes, with these shardings."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    shapes,
    shardings,
  )


def place(tree: PyTree, shardings: PyTree) -> PyTree:
  """The tree with these shardings; every process has the same one.

  A leaf that has its sharding already is not copied.
  """
  return jax.tree.map(_put, tree, shardings)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
  if isinstance(x, jax.Array) and x.sharding == sharding:
    return x
  if jax.process_count() == 1 or _is_global(x):
    return jax.device_put(x, sharding)
  if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    data = _put(jax.random.key_data(x), sharding)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
  # Each process has the full array: nothing need be sent.
  full = np.asarray(x)
  return jax.make_array_from_callback(full.shape, sharding, lambda i: full[i])


def _is_global(x: Any) -> bool:
  return isinstance(x, jax.Array) and not x.is_fully_addressable


def gather(tree: PyTree) -> PyTree:
  """The tree, on this host in full; all processes have to call it.

  A leaf that this process can address in full is not copied.
  """

  def gathered(x):
    if not _is_global(x):
      return x
    copy: Callable[[Any], Any] = jax.jit(
      lambda x: x, out_shardings=replicated(x.sharding.mesh)
    )
    return np.asarray(copy(x))

  return jax.tree.map(gathered, tree)

"""The declaration of a method, and what follows from it for any leaf of any method.

A method names the axes that each of its leaves carries: "stack", "in" and "out" are the
kernel's axes of that role, "kernel" is all of the kernel's axes, and any other name is
an axis of the method's own: "rank", or an option whose value is its size. Shapes,
counts, shardings, padding, stacking and checks are read off that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax_flax.errors import LoraxError
from lorax_flax.methods.axes import LeafAxes, Shape, resolved, shape_of
from lorax_flax.methods.common_leaves import stepped_together
from lorax_flax.methods.peft_form import PeftForm


class OnBias(NamedTuple):
  """bias' = scale * bias + added, both (*stack, *out); None for 1 and for 0."""

  scale: jax.Array | None = None
  added: jax.Array | None = None


class Delta:
  """A change of one leaf of the base; each method is a subclass.

  A method is a frozen dataclass, registered as a pytree, whose array fields are its
  leaves and whose other fields are static.

  Attributes:
    axes: the axes of each leaf by name, "stack" first. A leaf of stack axes alone may
      have the first of them only, or none, and is then the same along the others.
    trained: the leaves that are trained.
    common: trained leaves that all deltas of the method in an adapter have the same of;
      they carry no axis of the kernel. The optimiser takes one step for all.
    per_trial: untrained leaves that each trial of a sweep has its own of: the scale.
    from_base: untrained leaves that repeat the base's leaf, all layers of it; files
      of our own form leave them out.
    options: what `LoraConfig.options` may hold for the method, with defaults.
    irreversible: the reason why merged weights don't give the base back; "": they do.
    has_bias: whether it adds to the result of a product, and so to a bias in merging.
    scales_bias: whether the scale of the outputs is of the base's own bias too.
    bias_name: the name, in the kernel's module, of the base's bias that it changes.
    peft: its form in a PEFT folder; None: PEFT has none.
    alone: its form in a folder of the type that PEFT has for it where no kernel has a
      delta; None: there is none.
    layers: indices on the first stack axis that have a delta; None for all.
  """

  axes: ClassVar[dict[str, tuple[str, ...]]]
  trained: ClassVar[tuple[str, ...]]
  common: ClassVar[tuple[str, ...]] = ()
  per_trial: ClassVar[tuple[str, ...]] = ()
  from_base: ClassVar[tuple[str, ...]] = ()
  options: ClassVar[Mapping[str, Any]] = {}
  irreversible: ClassVar[str] = ""
  has_bias: ClassVar[bool] = False
  scales_bias: ClassVar[bool] = False
  peft: ClassVar[PeftForm | None] = None
  alone: ClassVar[PeftForm | None] = None

  if TYPE_CHECKING:  # Fields of the subclasses, which are dataclasses.
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __init__(self, *args: Any, **kwargs: Any): ...
    @property
    def layers(self) -> tuple[int, ...] | None: ...
    @property
    def bias_name(self) -> str: ...

  else:
    layers = None
    bias_name = "bias"

  @property
  def replaces(self) -> bool:
    """True where the base's leaf is not read: the delta is in its place."""
    return False

  def merged(self, w: jax.Array) -> jax.Array:
    """The base's leaf w with the delta in it, dense."""
    raise NotImplementedError

  def unmerged(self, w: jax.Array) -> jax.Array:
    """The base's leaf back from the merged one, dense, to rounding."""
    raise NotImplementedError

  def on_bias(self, w: jax.Array) -> "OnBias":
    """The change of the base's own bias beside w."""
    del w
    return OnBias()

  @classmethod
  def penalty(cls, deltas: Sequence[Self]) -> jax.Array | float:
    """The term that the method's deltas add to the loss in training."""
    del deltas
    return 0.0

  @classmethod
  def scheduled(
    cls, optimizer: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    """The optimiser, with what the method does to its deltas after each step.

    It is given adapters, dicts of path to delta, in which other methods may be too.
    """
    return stepped_together(optimizer, cls) if cls.common else optimizer

  def in_peft(self) -> "Delta":
    """The delta of the method that PEFT's folder has for it."""
    return self

  def kernel_axes(self) -> Mapping[str, tuple[int, ...]]:
    """The axes of the base's leaf, by the names that `axes` has for them."""
    raise NotImplementedError

  def leaves(self) -> dict[str, Any]:
    """The arrays by name."""
    static = {f.name for f in fields(self) if f.metadata.get("static")}
    return {name: x for name, x in vars(self).items() if name not in static}

  def leaf_axes(self, name: str) -> LeafAxes:
    """The axes that a leaf carries."""
    axes = resolved(self.axes[name], self.kernel_axes())
    if set(self.axes[name]) <= {"stack"}:
      return axes[: len(self.leaves()[name].shape)]
    return axes

  def sizes(self) -> dict[str, int]:
    """The sizes of the method's own axes, by name."""
    return {
      axis: size
      for name, leaf in self.leaves().items()
      # Another number of axes is for `check` to report.
      for axis, size in zip(self.leaf_axes(name), leaf.shape, strict=False)
      if isinstance(axis, str)
    }

  @property
  def rank(self) -> int:
    """The size of the axis "rank"; 0 where the method has none."""
    return self.sizes().get("rank", 0)

  def padded(self, rank: int) -> Self:
    """The delta with zeros from its own rank to this one."""
    more, found = rank - self.rank, {}
    for name in self.leaves():
      widths = [(0, more if axis == "rank" else 0) for axis in self.leaf_axes(name)]
      if (0, more) in widths and more:
        leaf = getattr(self, name)
        # On the host nothing is compiled for the shape.
        pad = np.pad if isinstance(leaf, np.ndarray) else jnp.pad
        found[name] = pad(leaf, widths)
    return replace(self, **found)

  def check(self, path: str, base: Shape) -> None:
    """Raises LoraxError unless every leaf fits the base's leaf at `path`.

    Args:
      base: shape of the base's leaf.
    """
    what = f"the adapter's delta of {path!r}"
    kernel = self.kernel_axes()
    if len(kernel["kernel"]) != len(base):
      raise LoraxError(
        f"{what} is for {len(kernel['kernel'])} axes, the base has shape {base}"
      )
    resized = {}
    if self.layers is not None:
      axis = next(iter(kernel.get("stack", ())), None)
      length = 0 if axis is None else base[axis]
      if axis is None or not all(
        type(i) is int and 0 <= i < length for i in self.layers
      ):
        raise LoraxError(
          f"{what} is for the layers {self.layers}, the base has shape {base}"
        )
      resized = {axis: len(self.layers)}
    sizes = self.sizes()
    for name, leaf in self.leaves().items():
      own = {} if name in self.from_base else resized
      shape = shape_of(self.leaf_axes(name), base, sizes, own)
      if tuple(leaf.shape) != shape:
        raise LoraxError(
          f"{what} has {name!r} of shape {tuple(leaf.shape)}, and {shape} was expected"
          f" beside the base's {base}"
        )

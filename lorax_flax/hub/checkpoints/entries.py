"""Entries of a key map: how one stored tensor and one of our leaves correspond."""

import dataclasses
import itertools
import string
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from lorax_flax.methods.peft_form import Form

Part = Literal["body", "head"]
Kind = Literal["linear", "conv", "embedding", "norm", "raw"]

# The stored axis of each of our axes: our (in, out) of torch's (out, in), and our
# (height, width, in, out) of torch's (out, in, height, width).
LINEAR = (1, 0)
CONV_1D = (2, 1, 0)
CONV_2D = (2, 3, 1, 0)
# Our (expert, in, out) of torch's (expert, out, in).
EXPERTS = (0, 2, 1)


@dataclasses.dataclass(frozen=True)
class Entry:
  """One leaf, or a slice of one; an `{i}` in its key makes one for each i.

  Attributes:
    path: our slash path, unscanned; its name "layer_{i}" stands for all layers.
    key: the bare checkpoint key. Each placeholder is counted in `KeyMap.counts`.
    axes: the transposition from the stored array to ours; None: none.
    part: "body" keys carry the family's prefix in a full key, "head" keys do not.
    piece: (k, n): the k-th of n equal slices of our leaf's last axis, for a leaf that
      holds several stored tensors side by side.
    labels: the last axis of our leaf has one position for each label.
  """

  path: str
  key: str
  axes: tuple[int, ...] | None = None
  part: Part = "body"
  piece: tuple[int, int] = (0, 1)
  labels: bool = False

  @property
  def form(self) -> Form:
    """The stored tensor's form, for our array (a slice of our leaf)."""
    return Form(self.axes)


@dataclasses.dataclass(frozen=True)
class Site:
  """The place of one checkpoint key in a params tree.

  Attributes:
    path: our leaf path, in the tree's own form (scanned or not).
    index: on the leaf's leading axes: the layer where layers are scanned, and the
      expert where experts are stacked.
    entry: of the key map.
  """

  path: str
  index: tuple[int, ...]
  entry: Entry

  @property
  def layer(self) -> int | None:
    """The first number of the index, or None."""
    return self.index[0] if self.index else None

  def place(self, shape: Sequence[int]) -> tuple[int | slice, ...]:
    """The index of this key's array in our leaf of this shape."""
    k, n = self.entry.piece
    if n == 1:
      return self.index
    width = shape[-1] // n
    between = (slice(None),) * (len(shape) - len(self.index) - 1)
    return (*self.index, *between, slice(k * width, (k + 1) * width))

  def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of this key's array in our leaf of this shape."""
    inner = tuple(shape[len(self.index) :])
    n = self.entry.piece[1]
    return inner if n == 1 else (*inner[:-1], inner[-1] // n)


def placeholders(key: str) -> list[str]:
  """The names in braces, in their order: ["i"] of "layer.{i}.bias"."""
  return [name for _, name, _, _ in string.Formatter().parse(key) if name]


Entries = tuple[Entry, ...]


def linear(path: str, key: str, *, bias: bool = True, **rest: Any) -> Entries:
  """The entries of a torch linear layer, whose weight is (out, in)."""
  kernel = Entry(f"{path}/kernel", f"{key}.weight", LINEAR, **rest)
  return (kernel, Entry(f"{path}/bias", f"{key}.bias", **rest))[: 2 if bias else 1]


def norm(path: str, key: str, *, bias: bool = True, **rest: Any) -> Entries:
  """The entries of a norm: a scale, and a bias where it has one."""
  scale = Entry(f"{path}/scale", f"{key}.weight", **rest)
  return (scale, Entry(f"{path}/bias", f"{key}.bias", **rest))[: 2 if bias else 1]


def each(make: Any, path: str, key: str, names: Iterable[str], **rest: Any) -> Entries:
  """The entries that `make` gives for modules of the same names on both sides."""
  found = (make(f"{path}/{name}", f"{key}.{name}", **rest) for name in names)
  return tuple(itertools.chain.from_iterable(found))


def embedding(path: str, key: str, **rest: Any) -> Entry:
  """The entry of an embedding, one vector a row as in torch."""
  return Entry(f"{path}/embedding", f"{key}.weight", **rest)


def weight_and_bias(*modules: str) -> tuple[str, ...]:
  """The two keys of each module."""
  return tuple(f"{name}.{part}" for name in modules for part in ("weight", "bias"))


def kind(entry: Entry) -> Kind:
  """The kind of module that a weight's entry belongs to."""
  if entry.axes in (CONV_1D, CONV_2D):
    return "conv"
  kinds: dict[str, Kind] = {
    "kernel": "linear",
    "embedding": "embedding",
    "scale": "norm",
  }
  return kinds.get(entry.path.rpartition("/")[2], "raw")

"""A method's form in a PEFT folder: the keys' ends, and the order of stored axes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Form:
  """A stored tensor as a reordering of our array's axes.

  Attributes:
    axes: the stored axis that each of ours is; None: as they are.
    ones: stored axes of size 1 that ours lacks. `axes` counts without them.
    split: the stored axis that holds experts and the rank, the experts outside on axis
      0 (A of PEFT's ParamWrapper) and inside on axis 1 (its B); ours has two axes
      there, and `axes` counts both. None: there is none.
    rank: with `split`, the size of the rank in it; see `of_rank`.
    holds_places: whether it is of int32: places in the module's weight as torch has
      it, by coordinates along its first axis, or flat where it has no other.
  """

  axes: tuple[int, ...] | None = None
  ones: tuple[int, ...] = ()
  split: int | None = None
  rank: int = 0
  holds_places: bool = False

  def of_rank(self, rank: int) -> "Form":
    """The form of a tensor of this rank."""
    return self if self.split is None else replace(self, rank=rank)

  def to_ours(self, stored: np.ndarray) -> np.ndarray:
    """The stored tensor as our array."""
    x = stored.squeeze(self.ones) if self.ones else stored
    if self.split is not None:
      shape = list(x.shape)
      experts = shape[self.split] // self.rank
      both = [experts, self.rank] if self.split == 0 else [self.rank, experts]
      shape[self.split : self.split + 1] = both
      x = x.reshape(shape)
    return x if self.axes is None else x.transpose(self.axes)

  def to_stored(self, ours: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`."""
    x = ours if self.axes is None else ours.transpose(np.argsort(self.axes))
    return x.reshape(self.stored_shape(ours.shape))

  def stored_shape(self, ours: Sequence[int]) -> tuple[int, ...]:
    """The stored tensor's shape, by that of our array."""
    order = range(len(ours)) if self.axes is None else np.argsort(self.axes)
    shape = [ours[i] for i in order]
    if self.split is not None:
      shape[self.split : self.split + 2] = [shape[self.split] * shape[self.split + 1]]
    for one in self.ones:
      shape.insert(one, 1)
    return tuple(shape)


AS_IS = Form()
TRANSPOSED = Form((1, 0))

# The end of a key to the leaf that its tensor is, and the tensor's form.
Keys = Mapping[str, tuple[str, Form]]


@dataclass(frozen=True)
class PeftForm:
  """The config and the tensors that PEFT has for a method.

  Attributes:
    flag: the field of PEFT's LoraConfig that turns the method on; None: plain LoRA, or
      no method of targets, or another type than LORA.
    keys: by kind of module, after the names of the `selections` that name it, if any:
      "feedforward linear". "turned" is a linear layer whose weight is an embedding's;
      "experts" is a stacked parameter.
    type: PEFT's peft_type.
    shared: the tensors that all modules share, by key after "base_model."; a delta's
      leaf is the first part of each axis of its kernel's.
    repeats_shared: whether they are there once more under every module.
    fields: of the type's config, less those that all types have: our name of what it
      means (of `hub.peft.config.PeftConfig`), and PEFT's default. LORA's are our own.
    options: PEFT's field to the method's option. One of the method's `selections` holds
      names of modules, or an expression.
    selected: what such an option is by model type, where PEFT's field is null.
    extends_lora: whether its config has LORA's fields too.
    lacks: fields that all other types have.
    off: fields, each with the values that are computed here; the first is written.
    training: fields that change how an adapter starts or trains and not what it
      computes, each with the value that is honoured.
    only: PEFT's bias= for the biases of the targets; None: by the type's name.
    since: the oldest peft_version whose folders mean what they mean now.
    targets: the default target_modules by model type, where they are the type's own.
    pruned_by: the end of the key whose tensor has zeros where a rank is pruned, and of
      the names in the config's rank_pattern, which says the rows that are there.
    topk_of: the option that is the number of logits along the last axis of tensors of
      which a folder may have the largest alone.
    own_targets: whether they are all that it has, and LORA's are not its defaults.
  """

  flag: str | None = None
  keys: Mapping[str, Keys] = field(default_factory=dict)
  type: str = "LORA"
  shared: Keys = field(default_factory=dict)
  repeats_shared: bool = False
  fields: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
  options: Mapping[str, str] = field(default_factory=dict)
  selected: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
  extends_lora: bool = False
  lacks: tuple[str, ...] = ()
  off: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
  training: Mapping[str, Any] = field(default_factory=dict)
  only: str | None = None
  since: str = "0"
  targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
  pruned_by: str = ""
  topk_of: str = ""
  own_targets: bool = False

  @property
  def targets_only(self) -> str:
    """PEFT's bias= for the biases of the targets alone."""
    return self.only or f"{self.type.lower()}_only"

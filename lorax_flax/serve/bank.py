"""The params of rows of which each has an adapter of its own, or none."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.many import Many, many
from lorax_flax.adapt.transform import adapt
from lorax_flax.methods import Adapter
from lorax_flax.models.registry import Loaded, Outline
from lorax_flax.serve import decoder
from lorax_flax.serve.adapters import Adapters


class Alone:
  """The params of a model without adapters."""

  def __init__(self, params: Any):
    """Takes what the decoder takes."""
    self._params = params

  def acquire(self, name: str | None) -> int:
    """The base's slot; there is no name."""
    assert name is None
    return -1

  def release(self, slot: int) -> None:
    """Does nothing."""

  def identity(self, slot: int) -> None:
    """None: the base alone computes."""

  def of(self, slots: Sequence[int]) -> Any:
    """The params, of any slots."""
    return self._params


class Bank:
  """The params of `decoder.many`.

  Attributes:
    adapters: those that it has.
  """

  def __init__(self, base: Any, adapters: Adapters):
    """Takes the base's params, and adapters over these."""
    self.adapters = adapters
    self._base = base

  def acquire(self, name: str | None) -> int:
    """The slot of an adapter until `release`; -1 for the base."""
    return -1 if name is None else self.adapters.acquire(name)

  def release(self, slot: int) -> None:
    """Ends one use of a slot."""
    if slot >= 0:
      self.adapters.release(slot)

  def identity(self, slot: int) -> int | None:
    """Number of the adapter in a slot that was acquired; None of the base."""
    return None if slot < 0 else self.adapters.identity(slot)

  def of(self, slots: Sequence[int]) -> Any:
    """The params of `decoder.many`, of the slot of each row."""
    return self._base, self.adapters.slots, np.array(slots, np.int32)


def slots(model: Outline, capacity: int, max_rank: int) -> Many:
  """Slots for adapters of a language model; arguments as of `lx.many`."""
  lora = adapt(decoder.forward_of(model), LoraConfig())
  return many(lora, capacity=capacity, max_rank=max_rank)


def all_linear(loaded: Loaded, rank: int) -> Adapter:
  """The shapes of LoRA of all linear weights."""
  config = LoraConfig(targets="all-linear", rank=rank)
  lora = adapt(decoder.forward_of(loaded), config)
  inputs = decoder.prompts([[0]], most=loaded.max_length)
  cache = loaded.blank_cache(1, inputs["input_ids"].shape[1])
  start = lambda: lora.init(jax.random.key(0), loaded.params, cache=cache, **inputs)
  shapes: Adapter = jax.eval_shape(start)
  return shapes

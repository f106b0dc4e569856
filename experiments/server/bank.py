"""The adapters in memory, each in a slot over the one base."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import lorax_flax as lx
from lorax_flax.adapt.many import AllSlots
from lorax_flax.errors import LoraxError
from lorax_flax.methods import Adapter
from lorax_flax.models.registry import Loaded
from lorax_flax.serve import decoder

log = logging.getLogger(__name__)


class Bank:
  """Slots of adapters. Those of the engine's thread alone call it."""

  def __init__(
    self, loaded: Loaded, examples: Mapping[str, Adapter], capacity: int, max_rank: int
  ):
    """Makes slots that hold nothing, for the weights that the examples change.

    Args:
      loaded: the base.
      examples: by name; those that don't fit are logged. None: the slots are for LoRA
        of all linear weights.
      capacity: number of slots.
      max_rank: the largest rank of an adapter.
    """
    self._params = loaded.params
    lora = lx.adapt(decoder.forward_of(loaded), lx.LoraConfig())
    self._many = lx.many(lora, capacity=capacity, max_rank=max_rank)
    fitting = [
      adapter for name, adapter in examples.items() if self._fits(name, adapter)
    ]
    fitting = fitting or [_all_linear(loaded, max_rank)]
    self._slots: AllSlots = self._many.empty(loaded.params, *fitting)
    self._free = list(range(capacity))
    # Compiled now, and not while texts are written.
    self.clear(self._free.pop())

  def put(self, adapter: Adapter) -> int:
    """Puts an adapter into a free slot; returns its number.

    Raises:
      LoraxError: no free slot, or an adapter that doesn't fit; it names the weight.
    """
    if not self._free:
      number = self._many.capacity
      raise LoraxError(f"{number} adapters are in memory: there is room for no more")
    self._slots = self._many.put(self._params, self._slots, self._free[0], adapter)
    return self._free.pop(0)

  def clear(self, slot: int) -> None:
    """Frees a slot."""
    self._slots = self._many.put(self._params, self._slots, slot, None)
    self._free.append(slot)

  def params(self, slots: Sequence[int | None]) -> Any:
    """What `decoder.many` takes, of the slot of each row; None for the base."""
    ids_B = np.array([-1 if slot is None else slot for slot in slots], np.int32)
    return self._params, self._slots, ids_B

  def _fits(self, name: str, adapter: Adapter) -> bool:
    try:
      jax.eval_shape(lambda: self._many.empty(self._params, adapter))
    except LoraxError as error:
      log.error(f"the adapter {name} is left out: {error}")
      return False
    return True


def _all_linear(loaded: Loaded, rank: int) -> Any:
  """The shapes of an adapter of all linear weights."""
  config = lx.LoraConfig(targets="all-linear", rank=rank)
  lora = lx.adapt(decoder.forward_of(loaded), config)
  inputs = decoder.prompts([[0]], most=loaded.max_length)
  width = inputs["input_ids"].shape[1]
  return jax.eval_shape(
    lambda: lora.init(
      jax.random.key(0), loaded.params, cache=loaded.blank_cache(1, width), **inputs
    )
  )

"""Adapters of parts of fused kernels, in the form that other libraries have."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_flax.hub.adapters.native import Saved
from lorax_flax.methods import Adapter, FusedLoRA


def parts_of(adapter: Adapter) -> tuple[bool, ...] | None:
  """loralib's enable_lora of an adapter's fused kernels; None where it has none."""
  found = (d.enable_lora for d in adapter.values() if isinstance(d, FusedLoRA))
  return next(found, None)


def widened(saved: Saved) -> Saved:
  """The adapter with a plain LoRA of the same value for each delta of some parts.

  n parts of rank r are one LoRA of rank n r whose second factor has zeros outside of
  their blocks. PEFT has no mask for these: trained further there, they fill up, and
  every column of the kernel changes.
  """
  parts = parts_of(saved.adapter)
  if parts is None:
    return saved
  n, config = sum(parts), saved.config
  # The scale, alpha / r or alpha / sqrt(r), stays as it is.
  factor = math.sqrt(n) if config.use_rslora else n

  def times(values: Mapping[str, Any], by: float) -> dict[str, Any]:
    return {
      name: tuple(by * x for x in each) if isinstance(each, Sequence) else by * each
      for name, each in values.items()
    }

  config = dataclasses.replace(
    config,
    method="lora",
    options={},
    rank=n * config.rank,
    alpha=factor * config.alpha,
    rank_pattern=times(config.rank_pattern, n),
    alpha_pattern=times(config.alpha_pattern, factor),
  )
  adapter = {
    path: delta.as_lora() if isinstance(delta, FusedLoRA) else delta
    for path, delta in saved.adapter.items()
  }
  return dataclasses.replace(saved, adapter=adapter, config=config)

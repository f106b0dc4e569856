"""lorax_flax: LoRA fine-tuning for JAX and Flax.

Take any function of a params pytree, freeze the params, train low-rank adapters beside
them. See `adapt`.
"""

from lorax_flax.adapt import (
  Adapted,
  LoraConfig,
  Plan,
  adapt,
  combine,
  freeze,
  merge,
  params_mask,
  partition,
  trainable_mask,
  unmerge,
)
from lorax_flax.errors import LoraxError
from lorax_flax.methods import (
  METHODS,
  Adapter,
  BiasLoRA,
  DoRA,
  KernelDelta,
  LoRA,
  LowRank,
  Parts,
  Rows,
  Tuned,
)
from lorax_flax.version import __version__

__all__ = [
  "METHODS",
  "Adapted",
  "Adapter",
  "BiasLoRA",
  "DoRA",
  "KernelDelta",
  "LoRA",
  "LoraConfig",
  "LoraxError",
  "LowRank",
  "Parts",
  "Plan",
  "Rows",
  "Tuned",
  "__version__",
  "adapt",
  "combine",
  "freeze",
  "merge",
  "params_mask",
  "partition",
  "trainable_mask",
  "unmerge",
]

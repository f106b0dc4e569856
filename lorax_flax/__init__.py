"""lorax_flax: LoRA fine-tuning for JAX and Flax.

Take any function of a params pytree, freeze the params, train low-rank adapters beside
them. See `adapt` and `fit`.
"""

from typing import TYPE_CHECKING, Any

from lorax_flax.adapt import (
  Adapted,
  LoraConfig,
  Many,
  Plan,
  adapt,
  as_lora,
  combine,
  combine_adapters,
  freeze,
  init_from_activations,
  init_from_gradients,
  many,
  merge,
  params_mask,
  partition,
  penalty,
  scheduled,
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
from lorax_flax.nodes import node
from lorax_flax.version import __version__

if TYPE_CHECKING:
  from lorax_flax.train.fit import fit

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
  "Many",
  "Parts",
  "Plan",
  "Rows",
  "Tuned",
  "__version__",
  "adapt",
  "as_lora",
  "combine",
  "combine_adapters",
  "fit",
  "freeze",
  "init_from_activations",
  "init_from_gradients",
  "many",
  "merge",
  "node",
  "params_mask",
  "partition",
  "penalty",
  "scheduled",
  "trainable_mask",
  "unmerge",
]


def __getattr__(name: str) -> Any:
  """Imports the training loop, and what it is made of, on first use alone."""
  if name == "fit":
    from lorax_flax.train.fit import fit

    return fit
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

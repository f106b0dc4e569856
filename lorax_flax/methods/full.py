"""A base leaf trained in full: a new head, a bias. PEFT's modules_to_save."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.methods.delta import Delta
from lorax_flax.methods.peft_form import AS_IS, PeftForm
from lorax_flax.nodes import node

_AROUND = ("input_layernorm", "post_attention_layernorm")
_FEEDFORWARD = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


@node
@dataclass(frozen=True)
class Tuned(Delta):
  """Replaces the base leaf.

  Attributes:
    value: what the leaf is now, or these layers of it; trained.
    original: the base leaf, kept so that `unmerge` can put it back. It shares the
      base's buffer until the adapter is saved or moved. A training step has none.
    layers: where layers are stacked and some of them trained, their indices; None for
      all, or for a leaf that is no stack.
  """

  value: jax.Array
  original: jax.Array
  layers: tuple[int, ...] | None = field(default=None, metadata={"static": True})

  axes: ClassVar = {"value": ("kernel",), "original": ("kernel",)}
  trained = ("value",)
  from_base = ("original",)
  # PEFT's wrapper, under which bias="all" repeats the biases of a saved module.
  peft = PeftForm(
    keys={
      "wrapped": {
        "modules_to_save": ("value", AS_IS),
        "original_module": ("original", AS_IS),
      },
    }
  )

  # Layer-norm tuning, by PEFT's own defaults where they are of models here.
  alone = PeftForm(
    type="LN_TUNING",
    keys={"norm": {"ln_tuning_layers": ("value", AS_IS)}},
    lacks=("layers_to_transform", "layers_pattern"),
    targets={
      **dict.fromkeys(("t5", "mt5"), ("layer_norm", "final_layer_norm")),
      "gpt2": ("ln_1", "ln_2", "ln_f"),
      **dict.fromkeys(("llama", "mistral", "gemma"), (*_AROUND, "norm")),
      **dict.fromkeys(("gemma2", "gemma3_text"), (*_AROUND, *_FEEDFORWARD, "norm")),
      **dict.fromkeys(("qwen2", "qwen3"), _AROUND[1:]),
    },
    own_targets=True,
  )

  @classmethod
  def start(cls, leaf: jax.Array, layers: tuple[int, ...] | None = None) -> Self:
    """The delta before the first step; it changes nothing, and its value is a copy."""
    chosen = leaf if layers is None else leaf[jnp.asarray(layers)]
    return cls(jnp.array(chosen, copy=True), leaf, layers)

  def kernel_axes(self) -> Mapping[str, tuple[int, ...]]:
    axes = tuple(range(len(self.value.shape)))
    return {"kernel": axes, "stack": axes[:1]}

  @property
  def replaces(self) -> bool:
    return self.layers is None

  def merged(self, w: Any) -> jax.Array:
    """The base's leaf with the value in its place, in the value's dtype."""
    if self.layers is None:
      return self.value
    full = w.astype(self.value.dtype)
    return full.at[jnp.asarray(self.layers)].set(self.value)

  def now(self) -> jax.Array:
    """The leaf as it is now, all layers of it."""
    return self.merged(self.original)

  def unmerged(self, w: jax.Array) -> jax.Array:
    """The base's leaf, exactly."""
    del w
    return self.original

"""Vectors of texts: the last token's features behind a language model's last norm.

Shapes: B texts, T tokens of the longest, D features.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.many import each
from lorax_flax.adapt.transform import adapt
from lorax_flax.models import head as heads
from lorax_flax.models.registry import Outline


def embedder(model: Outline, mixed: bool) -> Callable[..., jax.Array]:
  """(params, inputs) -> BxD float32, each of length 1; compiled once for each shape.

  Args:
    mixed: params are those of `decoder.many`, and not of `decoder.adapted`.
  """

  def forward(params: Any, inputs: Any) -> jax.Array:
    readout = heads.last_features(inputs["attention_mask"])
    found: Any = model.module.apply({"params": params}, **inputs, readout=readout)
    x_BxD = found.astype(jnp.float32)
    return x_BxD / jnp.linalg.norm(x_BxD, axis=1, keepdims=True)

  lora = adapt(forward, LoraConfig())

  def adapted(params: Any, inputs: Any) -> jax.Array:
    base, adapter = params
    found: jax.Array = lora.apply_part(base, adapter, inputs)
    return found

  def many(params: Any, inputs: Any) -> jax.Array:
    base, slots, ids_B = params
    run = lambda adapter, inputs: adapted((base, adapter), inputs)
    found: jax.Array = each(run, slots, ids_B, (inputs,))
    return found

  return jax.jit(many if mixed else adapted)

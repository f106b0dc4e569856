"""The places before a text: what a prefix or a prompt makes of a decoder's call.

Shapes: B batch, T tokens, P virtual tokens, D features.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax_flax.models.cache import Cache, Layout
from lorax_flax.models.layers import EVERY_SEGMENT
from lorax_flax.models.soft.prefix import Prefix, written
from lorax_flax.models.soft.prompt import Prompt
from lorax_flax.models.soft.settings import places


class Before(NamedTuple):
  """A call's inputs with what is before the text, whether or not something is.

  Attributes:
    mask_BxT: with a prompt's tokens.
    position_ids: of these; None: they count from `first`.
    first: position of the first column.
    cache: of the tokens before, the virtual ones included; None without a cache.
    each: what layers take of it, by name; see `stacking.stack`.
    prompt_PxD: embeddings before those of the tokens; None where there are none.
  """

  mask_BxT: jax.Array
  position_ids: jax.Array | None
  first: int
  cache: Cache | None
  each: Mapping[str, Any]
  prompt_PxD: jax.Array | None

  def put(self, x_BxTxD: jax.Array) -> jax.Array:
    """Embeddings with the prompt's before them."""
    if self.prompt_PxD is None:
      return x_BxTxD
    return _joined(self.prompt_PxD.astype(x_BxTxD.dtype), x_BxTxD)

  def fill(self, x_BxT: jax.Array, value: int) -> jax.Array:
    """Numbers of the tokens with a value for each of the prompt's before them."""
    if self.prompt_PxD is None:
      return x_BxT
    return _joined(jnp.full(len(self.prompt_PxD), value, x_BxT.dtype), x_BxT)

  def cut(self, x_BxTxD: jax.Array) -> jax.Array:
    """The tokens' activations, without the prompt's."""
    return x_BxTxD if self.prompt_PxD is None else x_BxTxD[:, len(self.prompt_PxD) :]


def before(
  module: Any,
  layout: Layout | None,
  width: int,
  mask_BxT: jax.Array,
  position_ids: jax.Array | None = None,
  cache: Cache | None = None,
) -> Before:
  """Puts a model's prefix or prompt before a text; to be called from a compact method.

  Args:
    module: the caller.
    layout: of a cache, whose sizes are a prefix's; None where the family has none.
    width: D.
    mask_BxT, position_ids, cache: of the call.
  """
  soft, p = module.config.soft, places(module.config.soft)
  kept: dict[str, Any] = {} if cache is None else {"kept": cache.layers}
  prefix, prompt = states(module, layout), None
  if soft is not None and soft.method == "prompt":
    std = soft.std_of("prompt/embedding")
    prompt = Prompt((p, width), std, name="prompt")()
  if cache is not None and cache.begun:
    return Before(mask_BxT, position_ids, 0, cache, kept, None)
  if prefix is not None:
    if cache is not None:
      cache = written(cache, prefix, module.scan)
      return Before(mask_BxT, position_ids, 0, cache, {"kept": cache.layers}, None)
    moved = None if position_ids is None else position_ids + p
    return Before(mask_BxT, moved, p, None, {"kept": prefix}, None)
  if prompt is None:
    return Before(mask_BxT, position_ids, 0, cache, kept, None)
  mask_BxT = _joined(jnp.full(p, EVERY_SEGMENT, mask_BxT.dtype), mask_BxT)
  if position_ids is not None:
    position_ids = _joined(jnp.arange(p, dtype=position_ids.dtype), position_ids + p)
  if cache is not None:
    # The prompt's tokens are the call's, and take the places kept for them.
    lengths_B = cache.lengths_B - p
    cache = dataclasses.replace(cache, lengths_B=lengths_B, begun=True)
  return Before(mask_BxT, position_ids, 0, cache, kept, prompt)


def states(module: Any, layout: Layout | None) -> jax.Array | None:
  """The states of a model's prefix, Lx2xPxGxK, or None; of a compact method."""
  soft = module.config.soft
  if soft is None or soft.method != "prefix":
    return None
  assert layout is not None
  shape = (len(layout.windows), 2, soft.length, layout.heads, layout.head_size)
  return Prefix(shape, soft.std_of("prefix/states"), name="prefix")()


def _joined(own: jax.Array, x: jax.Array) -> jax.Array:
  """The rows' own columns behind those that all rows share."""
  shared = jnp.broadcast_to(own[None], (len(x), *own.shape))
  return jnp.concatenate([shared, x], axis=1)

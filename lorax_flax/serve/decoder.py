"""The next token's logits, of a model and a cache: what generation calls in its loop.

Shapes: B rows, T tokens of the longest prompt, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.many import each
from lorax_flax.adapt.transform import adapt
from lorax_flax.errors import LoraxError
from lorax_flax.models import cache as caches
from lorax_flax.models import head as heads
from lorax_flax.models.cache import Cache
from lorax_flax.models.registry import Outline

# The fewest tokens to which prompts are padded.
LEAST_WIDTH = 16
# (params, cache=, **inputs) -> (the next token's logits, BxV float32, cache)
Forward = Callable[..., tuple[jax.Array, Cache]]


class Decoder(NamedTuple):
  """A language model as generation sees it; each call gives its cache away.

  `params` are whatever the forward that it was made of takes.

  Attributes:
    prefill: (params, inputs, cache) -> (logits_BxV float32 of the token after each
      row's last, cache). The inputs are those of the model, right-padded; the rows go
      on where the cache ends. Raises LoraxError for what has no room; compiled once
      for each shape.
    step: (params, ids_B, cache) -> (logits_BxV float32, cache), one token for each row;
      a negative id leaves its row as it is, and its logits are meaningless. That there
      is room is the caller's to check: see `cache.check_room`.
  """

  prefill: Callable[[Any, Mapping[str, Any], Cache], tuple[jax.Array, Cache]]
  step: Callable[[Any, jax.Array, Cache], tuple[jax.Array, Cache]]


def forward_of(model: Outline) -> Forward:
  """The function that `decoder_of` compiles, of the model's own params."""
  mask_name = f"{_prefix(model)}attention_mask"

  def forward(params: Any, *, cache: Cache, **inputs: Any) -> Any:
    readout = heads.last_logits(inputs[mask_name])
    return model.module.apply(
      {"params": params}, **inputs, cache=cache, readout=readout
    )

  return forward


def adapted(model: Outline) -> Forward:
  """`forward_of(model)` of params = (base, adapter), the adapter applied unmerged."""
  lora = adapt(forward_of(model), LoraConfig())

  def forward(params: Any, **inputs: Any) -> Any:
    base, adapter = params
    # An encoder's deltas have no part in the calls after the first.
    return lora.apply_part(base, adapter, **inputs)

  return forward


def many(model: Outline) -> Forward:
  """`adapted(model)` of params = (base, slots, ids_B): each row has its own adapter.

  Slots and ids are those of `lx.many`; the ids are of the cache's rows.
  """
  run = adapted(model)

  def forward(params: Any, *, cache: Cache, **inputs: Any) -> Any:
    base, slots, ids_B = params

    def one(adapter, cache, inputs):
      return run((base, adapter), cache=cache, **inputs)

    rows = cache.row_axes
    return each(one, slots, ids_B, (cache, inputs), (rows, 0), (0, rows))

  return forward


def decoder_of(model: Outline, forward: Forward | None = None) -> Decoder:
  """Compiles prefill and step of a model.

  Args:
    forward: `forward_of(model)` by default; `adapted(model)`, or another function of
      that form.
  """
  run, prefix = forward or forward_of(model), _prefix(model)

  # Both are compiled for a cache that is given away, so that it is written in place.
  @jax.jit(donate_argnames="cache")
  def prefill(params, inputs, cache):
    return run(params, **inputs, cache=cache)

  @jax.jit(donate_argnames="cache")
  def step(params, ids_B, cache):
    ids_Bx1 = ids_B[:, None]
    inputs = {
      f"{prefix}input_ids": jnp.maximum(ids_Bx1, 0),
      f"{prefix}attention_mask": (ids_Bx1 >= 0).astype(jnp.int32),
    }
    return run(params, **inputs, cache=cache)

  def checked(params, inputs, cache):
    caches.check_room(cache, np.asarray(inputs[f"{prefix}attention_mask"]).sum(-1))
    return prefill(params, dict(inputs), cache)

  return Decoder(checked, step)


def prompts(rows: Sequence[Sequence[int]], most: int) -> dict[str, np.ndarray]:
  """Token ids of unequal lengths as input_ids and attention_mask, int32 BxT.

  Padded on the right to a power of two, from LEAST_WIDTH on, or to `most` if that is
  smaller, so that few lengths are compiled.

  Raises:
    LoraxError: a row without a token, or with more than `most`.
  """
  lengths = [len(row) for row in rows]
  if not lengths or min(lengths) < 1 or max(lengths) > most:
    raise LoraxError(f"prompts of {lengths} tokens: each needs from 1 to {most}")
  width = min(most, max(LEAST_WIDTH, 1 << (max(lengths) - 1).bit_length()))
  ids_BxT = np.zeros((len(rows), width), np.int32)
  mask_BxT = np.zeros_like(ids_BxT)
  for i, row in enumerate(rows):
    ids_BxT[i, : len(row)], mask_BxT[i, : len(row)] = row, 1
  return {"input_ids": ids_BxT, "attention_mask": mask_BxT}


def _prefix(model: Outline) -> str:
  """The beginning of the names of the decoder's inputs."""
  has_encoder = "decoder_input_ids" in model.family.inputs(model.config)
  return "decoder_" if has_encoder else ""

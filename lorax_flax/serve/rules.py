"""Settings of decoding as arrays with a row's value each.

Rows of a batch may differ in them, and no value compiles anything anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.nodes import node
from lorax_flax.serve.settings import Decoding


@node
@dataclass(frozen=True)
class Rules:
  """Settings of each row, by the names of `Decoding` but for:

  Attributes:
    rest_B: 1 - top_p, the total probability that may be left out.
    keys_B: the random key of each row.
  """

  max_new_tokens_B: jax.Array
  min_new_tokens_B: jax.Array
  temperature_B: jax.Array
  top_k_B: jax.Array
  rest_B: jax.Array
  min_p_B: jax.Array
  repetition_penalty_B: jax.Array
  no_repeat_ngram_B: jax.Array
  keys_B: jax.Array


def of(decodings: Sequence[Decoding], numbers_B: np.ndarray) -> Rules:
  """Rules of rows.

  Args:
    decodings: settings of each row.
    numbers_B: the rows' numbers among all, non-negative. A row's random key follows
      from its seed and its number, whichever batch it is in.
  """
  ints = lambda name: jnp.asarray([getattr(d, name) for d in decodings], jnp.int32)
  floats = lambda name: jnp.asarray([getattr(d, name) for d in decodings], jnp.float32)
  seeds_B = jnp.asarray([d.seed for d in decodings], jnp.uint32)
  return Rules(
    max_new_tokens_B=ints("max_new_tokens"),
    min_new_tokens_B=ints("min_new_tokens"),
    temperature_B=floats("temperature"),
    top_k_B=ints("top_k"),
    # Subtracted in double precision, as transformers does.
    rest_B=jnp.asarray([1 - d.top_p for d in decodings], jnp.float32),
    min_p_B=floats("min_p"),
    repetition_penalty_B=floats("repetition_penalty"),
    no_repeat_ngram_B=ints("no_repeat_ngram"),
    keys_B=_keys(seeds_B, jnp.asarray(numbers_B, jnp.uint32)),
  )


@jax.jit
@jax.vmap
def _keys(seed: jax.Array, number: jax.Array) -> jax.Array:
  return jax.random.fold_in(jax.random.key(seed), number)

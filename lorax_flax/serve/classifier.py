"""Logits of texts by a classifier with an adapter beside its weights.

Shapes: N texts, C outputs.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.transform import adapt
from lorax_flax.data import pipeline
from lorax_flax.data.tokenize import tokenize
from lorax_flax.data.tokenizers.tokenizer import Tokenizer
from lorax_flax.data.tokens import TEXT_INPUTS
from lorax_flax.methods import Adapter
from lorax_flax.models.registry import Loaded

_MOST_ROWS = 32


@dataclass(frozen=True)
class Classifier:
  """A classifier of texts.

  Attributes:
    model: it and its weights.
    deltas: that are applied beside them.
    tokenizer: of its texts.
  """

  model: Loaded
  deltas: Adapter
  tokenizer: Tokenizer

  def logits(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
    """Logits of texts, NxC float32, and their number of tokens.

    Longer texts than the model takes are cut. Batches and lengths are powers of two, so
    that few programs are compiled, and adapters of one form share them.

    Raises:
      LoraxError: a text that can't be tokenised.
    """
    most = self.model.max_length
    rows = tokenize(
      [{"text": text} for text in texts],
      self.tokenizer,
      max_length=most,
      token_types=self.model.token_types,
    )
    powers = [1 << n for n in range(4, most.bit_length()) if 1 << n < most]
    size = min(_MOST_ROWS, 1 << (len(texts) - 1).bit_length())
    found: list[np.ndarray] = [np.empty(0)] * len(texts)
    for batch in pipeline.evaluation(rows, pipeline.Shape(size, (*powers, most))):
      inputs = {name: batch[name] for name in TEXT_INPUTS if name in batch}
      logits_BxC = _logits(self.model.module, self.model.params, self.deltas, inputs)
      computed = np.asarray(logits_BxC, np.float32)
      for row in np.flatnonzero(batch["index"] >= 0):
        found[batch["index"][row]] = computed[row]
    return np.stack(found), int(rows.lengths_N.sum())


@functools.partial(jax.jit, static_argnums=0)
def _logits(
  module: Any, params: Any, deltas: Adapter, inputs: Mapping[str, Any]
) -> jax.Array:
  def forward(params: Any, inputs: Mapping[str, Any]) -> jax.Array:
    return module.apply({"params": params}, **inputs, deterministic=True)

  return adapt(forward, LoraConfig()).apply(params, deltas, inputs)

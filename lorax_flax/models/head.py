"""The head of a language model, and what is read out of a model with it.

Logits for every token are the largest array of a training step, so a model hands its
head to a function instead: that of a loss takes a few tokens at a time, that of a
decoder the last token alone.

Shapes: B batch, T tokens, D features, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax_flax.models.given import Given
from lorax_flax.sharding import activations as spread


@dataclass(frozen=True)
class Head:
  """A function of features (…, D) that gives logits (…, V), float32.

  Attributes:
    weight: VxD or DxV.
    equation: the product's, as jnp.einsum has it.
    cap: bound of the logits: cap · tanh(logits / cap); None for none.
  """

  weight: Any
  equation: str
  cap: float | None = None

  def __call__(self, x: jax.Array) -> jax.Array:
    y = jnp.einsum(self.equation, x, self.weight.astype(x.dtype)).astype(jnp.float32)
    return y if self.cap is None else self.cap * jnp.tanh(y / self.cap)

  def gathered(self) -> "Head":
    """The head for a loop over tokens; see `sharding.activations.gathered`."""
    features = self.equation.split(",")[1].index("D")
    return replace(self, weight=spread.gathered(self.weight, features))


# The head, and x_BxTxD behind the last norm -> the model's outputs
Readout = Callable[[Head, jax.Array], Any]


def logits(head: Head, x_BxTxD: jax.Array) -> jax.Array:
  """Logits of every token, BxTxV float32: the readout of a plain call."""
  return head(x_BxTxD)


def last_logits(mask_BxT: jax.Array) -> Readout:
  """The readout of each row's last token, BxV float32.

  Args:
    mask_BxT: nonzero where a token is; of a row without any, the first column is read.
  """

  features = last_features(mask_BxT)
  return lambda head, x_BxTxD: head(features(head, x_BxTxD))


def last_features(mask_BxT: jax.Array) -> Readout:
  """The readout of each row's last token without the head, BxD; as `last_logits`."""

  def readout(head: Head, x_BxTxD: jax.Array) -> jax.Array:
    del head
    columns_T = jnp.arange(mask_BxT.shape[1], dtype=jnp.int32)
    last_B = jnp.max(jnp.where(mask_BxT != 0, columns_T[None, :], 0), axis=1)
    return jnp.take_along_axis(x_BxTxD, last_B[:, None, None], axis=1)[:, 0]

  return readout


def tied(table_VxD: Any) -> Head:
  """The head that is the table of token embeddings."""
  return Head(table_VxD, "...D,VD->...V")


def linear(kernel_DxV: Any) -> Head:
  """The head that multiplies by a kernel."""
  return Head(kernel_DxV, "...D,DV->...V")


class Linear(Given):
  """A head with a kernel of its own; called, it gives the head as a function.

  Attributes:
    vocab_size: V.
    std: standard deviation of a fresh kernel.
  """

  vocab_size: int
  std: float

  @nn.compact
  def __call__(self, features: int) -> Head:
    start = nn.initializers.normal(self.std)
    init = nn.with_logical_partitioning(start, ("embed", "vocab"))
    return linear(self.param("kernel", init, (features, self.vocab_size)))

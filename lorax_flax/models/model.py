"""What the models of all families have in common."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError
from lorax_flax.models.layers import DType


class Model(nn.Module):
  """A whole model; a family's own is called with its inputs by name.

  Attributes:
    config: the family's own; see `lorax_flax.models.family.Family`.
    dtype: of computing; norms, softmax and logits are float32.
    scan: the layers are stacked under "…/layers" and scanned.
    remat: what is recomputed in the backward pass: "none", "full" or "dots".
  """

  config: Any
  dtype: DType = jnp.float32
  scan: bool = False
  remat: str = "none"


def check_length(input_ids_BxT: jax.Array, room: int) -> None:
  """Raises LoraxError for texts that are longer than a model has positions for."""
  if (length := input_ids_BxT.shape[1]) > room:
    raise LoraxError(f"a text of {length} tokens: the model takes at most {room}")

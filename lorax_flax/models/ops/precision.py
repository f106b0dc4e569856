"""What is computed in float32 however little its inputs hold."""

import jax.numpy as jnp
import numpy as np


def wide(dtype) -> np.dtype:
  """float32, or `dtype` where that is wider."""
  return jnp.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)

"""One layer of each kind that a method changes, as a function of its parameters."""

import numpy as np
from jax import lax


def conv(p, x):
  layout = ("NCHW", "OIHW", "NCHW")
  y = lax.conv_general_dilated(
    x, p["kernel"], (1, 1), "VALID", dimension_numbers=layout
  )
  return y + p["bias"][None, :, None, None]


FUNCTIONS = {
  "linear": lambda p, x: x @ p["kernel"] + p["bias"][None],
  "embedding": lambda p, x: p["kernel"][x],
  "conv": conv,
}
SHAPES = {"linear": (5, 7), "embedding": (11, 5), "conv": (7, 5, 3, 2)}


def inputs(kind):
  rng = np.random.default_rng(0)
  if kind == "embedding":
    return np.array([[1, 3, 3], [10, 0, 4]])
  return rng.normal(size=(3, 5) if kind == "linear" else (2, 5, 6, 7)).astype("f4")


def params(kind):
  rng = np.random.default_rng(1)
  found = {"kernel": rng.normal(size=SHAPES[kind]).astype("f4")}
  if kind != "embedding":
    found["bias"] = rng.normal(size=7).astype("f4")
  return found

"""Merged models as StableHLO, run by a process that has JAX and little else."""

import json
import os
import re
import subprocess
import sys
import textwrap
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import flatbuffers  # noqa: F401  The format needs it: its absence is no other failure.
import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import lorax_flax as lx
from experiments.inference import merged
from experiments.merge import merge
from lorax_flax import quant
from lorax_flax.errors import LoraxError
from lorax_flax.models.stablehlo import PLATFORMS
from tests.experiments import peers

# The format of the base's kernels, by family.
FAMILIES = {
  "bert": None,
  "deberta-v2": None,
  "gpt2": "int8",
  "llama": None,
  "t5": None,
  "vit": None,
}
# What JAX and safetensors import.
PACKAGES = ("jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "safetensors")
# The README's code, and then inputs of other sizes.
RUN = """
import os, sys
from safetensors.numpy import save_file
assert "lorax_flax" not in sys.modules
try:
  import lorax_flax
except ModuleNotFoundError:
  pass
else:
  raise AssertionError("the package can be imported")
for family in sys.argv[1:]:
  os.chdir(os.path.join(sys.path[0] or ".", family))
  readme = open("README.md").read()
  found = {}
  exec(readme.split("```python")[1].split("```")[0], found)
  other = load_file("../" + family + ".inputs")
  answers = {"first": found["logits"], "second": found["model"](found["params"], other)}
  save_file({n: found["np"].asarray(x) for n, x in answers.items()}, "../" + family)
"""


def _inputs(like, rows, length):
  """Random inputs; the last row ends in padding."""
  draws = np.random.default_rng(rows)

  def draw(name, x):
    if x.dtype == np.float32:
      return draws.standard_normal((rows, *x.shape[1:]), np.float32)
    if name.endswith("mask"):
      return (np.arange(length) < length - np.arange(rows)[:, None]).astype(np.int32)
    most = 2 if name == "token_type_ids" else 24
    return draws.integers(most, size=(rows, length), dtype=np.int32)

  return {name: draw(name, x) for name, x in like.items()}

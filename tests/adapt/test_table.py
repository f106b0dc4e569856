"""Every layer, looped and scanned, with and without remat, in each library."""

import jax
import numpy as np
import pytest

import lorax_flax as lx
from tests.adapt import cells
from tests.adapt.checks import (
  check_equals_merged,
  check_no_dense_gradient,
  perturbed,
)

# Library -> (function that builds a stack, cell -> names of its targets).
LIBRARIES = {
  "linen": (cells.linen, cells.TARGETS),
  "nnx": (cells.nnx_stack, cells.TARGETS),
  "equinox": (cells.equinox, {name: c[1] for name, c in cells.EQUINOX.items()}),
  "haiku": (cells.haiku, {name: c[1] for name, c in cells.HAIKU.items()}),
}
# A layer of a remat is followed as one of a scan's remat is: by one cell alone.
CASES = [
  (library, cell, mode)
  for library, (_, found) in LIBRARIES.items()
  for cell in found
  for mode in ("plain", "scan", "scan_remat", *["remat"] * (cell == "attention"))
]


@pytest.mark.parametrize(("library", "cell", "mode"), CASES)
def test_adapted_equals_merged_and_forms_no_dense_gradient(library, cell, mode):
  build, targets = LIBRARIES[library][0], LIBRARIES[library][1][cell]
  apply_fn, params, x = build(cell, mode)
  lora = lx.adapt(apply_fn, lx.LoraConfig(rank=2, targets=targets))
  adapter = lora.init(jax.random.key(2), params, x)

  per_layer = 1 if "scan" in mode else 3
  assert len(adapter) == per_layer * len(targets)
  np.testing.assert_array_equal(
    lora.apply(params, adapter, x), apply_fn(params, x), "not a no-op at the start"
  )
  adapter = perturbed(adapter)
  check_equals_merged(lora, apply_fn, params, adapter, x)
  check_no_dense_gradient(lora, params, adapter, x)
  back = lx.unmerge(lx.merge(params, adapter), adapter)
  jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, atol=1e-5), back, params)

"""Every layer, under every transformation, in both of Flax's APIs."""

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

BUILD = {"linen": cells.linen, "nnx": cells.nnx_stack}


@pytest.mark.parametrize("mode", ["plain", "scan", "remat", "scan_remat"])
@pytest.mark.parametrize("cell", list(cells.LINEN))
@pytest.mark.parametrize("api", list(BUILD))
def test_adapted_equals_merged_and_forms_no_dense_gradient(api, cell, mode):
  apply_fn, params, x = BUILD[api](cell, mode)
  lora = lx.adapt(apply_fn, lx.LoraConfig(rank=2, targets=cells.TARGETS[cell]))
  adapter = lora.init(jax.random.key(2), params, x)

  per_layer = 1 if "scan" in mode else 3
  assert len(adapter) == per_layer * len(cells.TARGETS[cell])
  np.testing.assert_array_equal(
    lora.apply(params, adapter, x), apply_fn(params, x), "not a no-op at the start"
  )
  adapter = perturbed(adapter)
  check_equals_merged(lora, apply_fn, params, adapter, x)
  check_no_dense_gradient(lora, params, adapter, x)
  back = lx.unmerge(lx.merge(params, adapter), adapter)
  jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, atol=1e-5), back, params)

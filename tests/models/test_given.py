"""Parameters that a module is given, against Flax's own check."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

from lorax_flax.models.layers import Dense, dense

X = jnp.ones((2, 3))


@pytest.fixture
def params():
  module = dense(5, ("embed", "mlp"), jnp.float32)
  return nn.unbox(module.init(jax.random.key(0), X))


def test_the_result_is_flaxs(params):
  ours = dense(5, ("embed", "mlp"), jnp.float32).apply(params, X)
  np.testing.assert_array_equal(ours, nn.Dense(5).apply(params, X))


def test_an_initializer_is_not_traced_again(params):
  def never(*args):
    raise AssertionError

  Dense(5, kernel_init=never, bias_init=never).apply(params, X)


def test_another_shape_or_name_is_flaxs_error(params):
  kernel, bias = params["params"]["kernel"], params["params"]["bias"]
  for given, error in (
    ({"kernel": kernel[:2], "bias": bias}, ScopeParamShapeError),
    ({"kernel": kernel}, ScopeParamNotFoundError),
  ):
    for module in (dense(5, ("embed", "mlp"), jnp.float32), nn.Dense(5)):
      with pytest.raises(error, match=r"kernel|bias"):
        module.apply({"params": given}, X)

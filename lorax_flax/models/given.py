"""Parameters that a module is given, taken as they are."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np
from flax.core import meta
from flax.errors import ScopeParamShapeError


class Given(nn.Module):
  """A module whose parameters are compared with the shape that it asks for.

  Flax traces each one's initializer to learn it, wherever a module is applied, which
  takes a third of the time in which a model is traced.
  """

  @nn.nowrap
  def param(self, name: str, init_fn: Callable[..., Any], *init_args, **options) -> Any:
    """The parameter; see `flax.linen.Module.param`.

    Args:
      init_args: the shape, first of all.

    Raises:
      ScopeParamShapeError: it has another.
    """
    if not self.has_variable("params", name):
      return super().param(name, init_fn, *init_args, **options)
    value, shape = meta.unbox(self.get_variable("params", name)), init_args[0]
    if np.shape(value) != tuple(shape):
      place = self.scope.path_text if self.scope is not None else ""
      raise ScopeParamShapeError(name, place, np.shape(value), shape)
    return value

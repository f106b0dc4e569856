"""Starts that look at data: adapters whose first factors are of the loss's gradient."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lorax_flax.adapt.paths import PyTree, arrays, map_with_path
from lorax_flax.adapt.plan import start
from lorax_flax.adapt.transform import Adapted
from lorax_flax.errors import LoraxError
from lorax_flax.methods import Adapter
from lorax_flax.quant import dense


def mean_gradients(
  loss: Callable[[PyTree, Any], jax.Array],
  params: PyTree,
  batches: Iterable[Any],
  paths: Collection[str],
) -> dict[str, jax.Array]:
  """The mean gradient of a loss with respect to some leaves, float32.

  Args:
    loss: (params, batch) to a scalar.
    batches: a few.
    paths: of the leaves; these gradients alone are formed, each of its leaf's size.

  Raises:
    LoraxError: no batch.
  """
  leaves = arrays(params)
  chosen = {path: dense(leaves[path]) for path in paths}

  @jax.jit
  def gradient(chosen, leaves, batch):
    def of_chosen(chosen):
      now = {**leaves, **chosen}
      return loss(map_with_path(lambda path, x: now.get(path, x), params), batch)

    found = jax.grad(of_chosen)(chosen)
    return {path: x.astype(jnp.float32) for path, x in found.items()}

  n = 0
  total = {path: jnp.zeros(x.shape, jnp.float32) for path, x in chosen.items()}
  for batch in batches:
    n, total = n + 1, jax.tree.map(jnp.add, total, gradient(chosen, leaves, batch))
  if not n:
    raise LoraxError("mean_gradients: there is no batch")
  return {path: x / n for path, x in total.items()}


def init_from_gradients(
  lora: Adapted,
  key: jax.Array,
  params: PyTree,
  loss: Callable[[PyTree, Any], jax.Array],
  batches: Iterable[Any],
  /,
  *args,
  **kwargs,
) -> Adapter:
  """An adapter that changes nothing yet, started with a loss's gradients (LoRA-GA).

  Args:
    lora: its method is one that starts from gradients.
    key: as for `lora.init`.
    loss, batches: as for `mean_gradients`.
    args, kwargs: arguments to trace the function with, as for `lora.init`.
  """
  plan = lora.plan(params, *args, **kwargs)
  paths = [target.path for target in plan.targets]
  gradients = mean_gradients(loss, params, batches, paths)
  return start(plan, key, arrays(params), gradients)

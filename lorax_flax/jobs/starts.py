"""The adapter before the first step, where its start looks at training data."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lorax_flax.adapt.activations import init_from_activations
from lorax_flax.adapt.gradients import init_from_gradients
from lorax_flax.adapt.paths import flatten
from lorax_flax.adapt.plan import Plan, start
from lorax_flax.adapt.transform import Adapted
from lorax_flax.methods import Adapter
from lorax_flax.models import registry
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train.objective import Objective

Batch = Mapping[str, Any]

# The number of training batches that a start looks at.
BATCHES = 8


def started(
  plan: Plan,
  lora: Adapted,
  model: registry.Loaded,
  seed: int,
  objective: Objective,
  batches: Callable[[], Iterator[Batch]],
  mesh: Mesh,
) -> Adapter:
  """The adapter as its plan says it starts.

  Args:
    seed: of the adapter.
    batches: gives the training batches; called by a start that looks at data, which
      takes the first `BATCHES`.
  """
  key, params = jax.random.key(seed), model.params
  sources = {target.starts_from for target in plan.targets} - {"kernel"}
  if not sources:
    return start(plan, key, flatten(params))
  sharding = meshes.batch(mesh)
  given = [
    {name: meshes.place(x, sharding) for name, x in batch.items()}
    for batch in itertools.islice(batches(), BATCHES)
  ]
  with jax.set_mesh(mesh):
    if sources == {"inputs"}:
      weights = lambda batch: _weights(objective, batch)
      each = [(batch,) for batch in given]
      return init_from_activations(lora, key, params, each, weights=weights)

    def loss(params: Any, batch: Batch) -> jax.Array:
      losses_B = objective.loss(lora.apply_fn(params, batch), batch)
      return jnp.sum(losses_B * batch["weights"]) / jnp.sum(batch["weights"])

    return init_from_gradients(lora, key, params, loss, given, given[0])


def _weights(objective: Objective, batch: Batch) -> list[jax.Array]:
  """1 for each entry of a batch that is neither padding nor of a row of padding."""
  found = []
  for name, padding in objective.throughput.columns.items():
    real = batch[name] != padding
    rows = batch["weights"].reshape(-1, *[1] * (real.ndim - 1)) > 0
    found.append(real & rows)
  return found

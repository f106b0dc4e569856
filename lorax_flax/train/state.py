"""The state that a step changes, and the base that it reads."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorax_flax.adapt.partition import combine, partition, trainable_mask
from lorax_flax.methods import Adapter
from lorax_flax.sharding import mesh as meshes

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
  """Everything that a step changes; a checkpoint holds it and the position in the data.

  Attributes:
    trained: the adapter with None for untrained leaves; float32.
    opt_state: the optimiser's, for the trained leaves alone.
    step: int32 (), optimiser steps done.
    key: typed PRNG key (); step n draws from fold_in(key, n).
  """

  trained: Adapter
  opt_state: PyTree
  step: jax.Array
  key: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Base:
  """Everything that a step only reads: neither differentiated nor donated.

  Attributes:
    params: the model's, frozen.
    rest: the untrained leaves of the adapter, None for the trained ones.
  """

  params: PyTree
  rest: Adapter

  def adapter(self, trained: Adapter) -> Adapter:
    """The full adapter, as `lora.apply` takes it."""
    return combine(trained, self.rest)


def create(
  params: PyTree,
  adapter: Adapter,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
) -> tuple[TrainState, Base]:
  """The state before the first step, and the base.

  The trained leaves are copied: the state is donated to each step, and a tuned leaf may
  share its buffer with the base.
  """
  trained, rest = partition(adapter, trainable_mask(adapter))
  trained = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trained)
  state = TrainState(trained, optimizer.init(trained), jnp.zeros((), jnp.int32), key)
  return state, Base(params, rest)


def shardings(
  state: TrainState, adapter: Adapter, mesh: jax.sharding.Mesh
) -> TrainState:
  """Shardings of the state: an optimiser's moments are sharded as their leaf.

  A leaf of the optimiser's is the moment of a trained leaf where its path ends in that
  one's, and its shape is the same; all others are replicated.

  Args:
    state: arrays or ShapeDtypeStructs.
    adapter: shardings, as `mesh.of_adapter` gives them.
  """
  trained, _ = partition(adapter, trainable_mask(adapter))
  replicated = meshes.replicated(mesh)
  leaves = dict(jax.tree.leaves_with_path(state.trained))
  own = dict(jax.tree.leaves_with_path(trained))

  def of(place, leaf):
    for end in (place[i:] for i in range(len(place))):
      if end in own and leaves[end].shape == leaf.shape:
        return own[end]
    return replicated

  opt_state = jax.tree.map_with_path(of, state.opt_state)
  # The same tree, with a sharding in each leaf's place.
  return TrainState(trained, opt_state, replicated, replicated)  # type: ignore[arg-type]

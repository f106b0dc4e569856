"""The state that a step changes, and the base that it reads."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorax_flax.adapt.partition import combine, leaf_mask, partition, trainable_mask
from lorax_flax.adapt.paths import arrays, map_with_path
from lorax_flax.methods import Adapter
from lorax_flax.nodes import node
from lorax_flax.quant import dense
from lorax_flax.sharding import mesh as meshes

PyTree = Any


@node
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


@node
@dataclass(frozen=True)
class Base:
  """Everything that a step only reads: neither differentiated nor donated.

  Attributes:
    params: the model's, frozen; anything in place of a leaf that is trained in full.
    rest: the untrained leaves of the adapter, None for the trained ones and for those
      that repeat the base's.
  """

  params: PyTree
  rest: Adapter

  def full(self, trained: Adapter) -> tuple[PyTree, Adapter]:
    """The params and the adapter, as `lora.apply` takes them.

    Both have what is trained in full as it is now: the adapter can't be unmerged.
    """

    def now(path, leaf):
      delta = trained.get(path)
      return delta.merged(leaf) if delta is not None and delta.replaces else leaf

    params = map_with_path(now, self.params)
    leaves = arrays(params)
    rest = {
      path: replace(d, **dict.fromkeys(d.from_base, dense(leaves[path])))
      if d.from_base
      else d
      for path, d in self.rest.items()
    }
    return params, combine(trained, rest)


def own(adapter: Adapter) -> Adapter:
  """The adapter, or its shardings, with None for the leaves that repeat the base's."""
  return partition(adapter, leaf_mask(adapter, lambda delta: delta.from_base))[1]


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
  adapter = own(adapter)
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

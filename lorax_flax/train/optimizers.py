"""The optimisers, by name: the direction in which each one steps."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from lorax_flax.methods.delta import Delta

PyTree = Any
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Optimizer:
  """An optimiser, without clipping, decay and learning rate, which all have in common.

  Attributes:
    direction: (values of `reads`) -> transformation of gradients into a descent's
      direction, of about unit size in each element but for SGD.
    reads: the fields of `TrainConfig` that it has a use for.
    by_element: whether each element's direction follows from its own gradients alone.
  """

  direction: Callable[[Fields], optax.GradientTransformation]
  reads: tuple[str, ...] = ()
  by_element: bool = True


def _adam(fields: Fields) -> optax.GradientTransformation:
  return optax.scale_by_adam(b1=fields["b1"], b2=fields["b2"], eps=fields["eps"])


def _lion(fields: Fields) -> optax.GradientTransformation:
  return optax.scale_by_lion(b1=fields["b1"], b2=fields["b2"])


def _sgd(fields: Fields) -> optax.GradientTransformation:
  return optax.trace(decay=fields["momentum"])


def _adafactor(fields: Fields) -> optax.GradientTransformation:
  """Second moments of a matrix by their means over its rows and its columns.

  arXiv 1804.04235, as transformers' Trainer runs it: the learning rate is given.
  """
  del fields
  return _by_layer(
    optax.chain(
      optax.scale_by_factored_rms(min_dim_size_to_factor=2),
      optax.clip_by_block_rms(1.0),
    )
  )


def _muon(fields: Fields) -> optax.GradientTransformation:
  """Muon of the factors, each layer's matrix apart, and Adam of all other leaves.

  An update has the size of Adam's (arXiv 2502.16982), so that learning rates carry
  over: its root mean square is 0.2.
  """

  def sized(updates, params):
    del params
    return of_leaves(_adams_size, updates)

  factors = optax.chain(
    scale_by_muon(
      beta=fields["momentum"],
      weight_dimension_numbers=lambda updates: of_leaves(_matrix, updates),
    ),
    optax.stateless(sized),
  )
  return optax.partition(
    {"factors": factors, "others": _adam(fields)},
    lambda trained: of_leaves(_label, trained),
  )


OPTIMIZERS: dict[str, Optimizer] = {
  "adafactor": Optimizer(_adafactor, by_element=False),
  "adamw": Optimizer(_adam, ("b1", "b2", "eps")),
  "lion": Optimizer(_lion, ("b1", "b2")),
  "muon": Optimizer(_muon, ("momentum", "b1", "b2", "eps"), by_element=False),
  "sgd": Optimizer(_sgd, ("momentum",)),
}


def of_leaves(function: Callable[[Delta, str], Any], trained: PyTree) -> PyTree:
  """A tree like that of the trained leaves, of `function(delta, name)` for each."""

  def each(delta: Delta) -> Delta:
    present = {n for n, x in delta.leaves().items() if jax.tree.leaves(x)}
    return replace(delta, **{name: function(delta, name) for name in present})

  return jax.tree.map(each, trained, is_leaf=lambda x: isinstance(x, Delta))


def is_other_factor(delta: Delta, name: str) -> bool:
  """True for the factor that is not contracted with the input, LoRA's b."""
  return {"rank", "out"} <= set(type(delta).axes[name])


def _depth(delta: Delta, name: str) -> int:
  """Number of a leaf's leading axes over layers or experts."""
  axes = type(delta).axes[name]
  return len(delta.kernel_axes()["stack"]) if "stack" in axes else 0


def _label(delta: Delta, name: str) -> str:
  axes = type(delta).axes[name]
  is_factor = "rank" in axes and not {"in", "out"}.isdisjoint(axes)
  return "factors" if is_factor else "others"


def _matrix(delta: Delta, name: str) -> MuonDimensionNumbers:
  """A factor's axes as those of a matrix, with a row for each place of the rank."""
  axes = range(delta.leaves()[name].ndim)[_depth(delta, name) :]
  rank = delta.leaf_axes(name).index("rank")
  return MuonDimensionNumbers(tuple(i for i in axes if i != rank), (rank,))


def _adams_size(delta: Delta, name: str) -> jax.Array:
  """Semi-orthogonal matrices, scaled to a root mean square of 0.2."""
  x, axes = delta.leaves()[name], _matrix(delta, name)
  sizes = [math.prod(x.shape[i] for i in group) for group in axes]
  return 0.2 * math.sqrt(max(sizes)) * x


def _by_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """The transformation of each layer's leaf by itself, where layers are stacked.

  Its state is a list, of one state of `inner` for each leaf.
  """

  def init(trained):
    depths = jax.tree.leaves(of_leaves(_depth, trained))
    leaves = jax.tree.leaves(trained)
    return [_vmapped(inner.init, n)(x) for n, x in zip(depths, leaves, strict=True)]

  def update(updates, state, trained):
    depths = jax.tree.leaves(of_leaves(_depth, updates))
    leaves, structure = jax.tree.flatten(updates)
    columns = (depths, leaves, state, jax.tree.leaves(trained))
    done = [_vmapped(inner.update, n)(*rest) for n, *rest in zip(*columns, strict=True)]
    return jax.tree.unflatten(structure, [x for x, _ in done]), [s for _, s in done]

  return optax.GradientTransformation(init, update)


def _vmapped(function: Callable, depth: int) -> Callable:
  for _ in range(depth):
    function = jax.vmap(function)
  return function

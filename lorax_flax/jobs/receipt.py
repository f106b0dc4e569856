"""A merge and its receipt: how much of an adapter's change the stored weights keep."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax_flax as lx
from lorax_flax import quant
from lorax_flax.adapt.merge import deferred, kept
from lorax_flax.adapt.paths import arrays, map_with_path
from lorax_flax.methods import Adapter
from lorax_flax.models.registry import Loaded

# (path, a merged leaf in the base's dtype) -> the leaf that is read where it was stored
Store = Callable[[str, jax.Array], Any]

_ROWS, _TOKENS = 2, 8


@dataclass(frozen=True)
class Figures:
  """Losses of merged weights that were stored.

  Attributes:
    kept: share of the adapter's change that is left after rounding, weighted by its
      square; above 1 where rounding enlarges it.
    least: the share of the weight that keeps least, and its path; None where nothing
      changes.
    largest_logit_difference: from the adapter beside the base, over the `probe`; None
      where that was left out.
  """

  kept: float
  least: tuple[float, str] | None
  largest_logit_difference: float | None


def merge(
  loaded: Loaded, deltas: Adapter, stores: Mapping[str, Store], *, probe: bool = True
) -> tuple[Any, dict[str, Figures]]:
  """Merges an adapter, and compares what is stored with the adapter beside the base.

  The share that is kept is measured a weight at a time. The probe needs a model at a
  time in memory: the base, then each of `stores`.

  Args:
    loaded: the base; its leaves may be deferred.
    deltas: the adapter.
    stores: by name, forms of the merged weights.
    probe: whether to compare logits too.

  Returns:
    The merged weights in the base's dtypes, those that change deferred, and the figures
    of each of `stores`.

  Raises:
    LoraxError: as of `lx.merge`.
  """
  leaves = arrays(loaded.params)
  in_base = {p: delta for p, delta in deltas.items() if p not in loaded.new_paths}
  shares = {}
  for name, store in stores.items():

    def stored(path: str, leaf: jax.Array, store: Store = store) -> jax.Array:
      found = store(path, leaf.astype(leaves[path].dtype))
      return jnp.asarray(quant.dense(found), jnp.float32)

    shares[name] = kept(loaded.params, in_base, stored)
  merged = deferred(loaded.params, deltas)
  errors = _errors(loaded, deltas, merged, stores) if probe else {}
  return merged, {n: _figures(each, errors.get(n)) for n, each in shares.items()}


def _errors(
  loaded: Loaded, deltas: Adapter, merged: Any, stores: Mapping[str, Store]
) -> dict[str, float]:
  """The largest difference of a logit over the probe, of each of `stores`."""
  logits = probed(loaded)
  expected = np.asarray(logits(*quant.realized((loaded.params, deltas))))

  def error(store: Store) -> float:
    def stored(path: str, leaf: Any) -> quant.Deferred:
      return quant.Deferred(leaf, lambda: store(path, quant.dense(leaf)))

    params = quant.realized(map_with_path(stored, merged))
    return float(np.abs(np.asarray(logits(params, {})) - expected).max())

  return {name: error(store) for name, store in stores.items()}


def requantized(loaded: Loaded) -> Store:
  """The form of a base whose kernels are quantised as they are in `loaded`."""
  leaves = arrays(loaded.params)
  likes = {path: getattr(leaf, "like", leaf) for path, leaf in leaves.items()}
  names = {p: quant.name_of(x) for p, x in likes.items() if quant.is_quantized(x)}

  def store(path: str, leaf: jax.Array) -> Any:
    return quant.quantize(leaf, names[path]) if path in names else leaf

  return store


def probe(model: Loaded) -> dict[str, np.ndarray]:
  """Inputs of a model, the same each time: random tokens, or random pixels."""
  draws = np.random.default_rng(0)

  def draw(name: str, like: jax.ShapeDtypeStruct) -> np.ndarray:
    if jnp.issubdtype(like.dtype, jnp.floating):
      return draws.standard_normal((_ROWS, *like.shape[1:])).astype(like.dtype)
    shape = _ROWS, min(_TOKENS, model.max_length)
    if name.endswith("mask"):
      return np.ones(shape, like.dtype)
    return draws.integers(model.config.vocab_size, size=shape, dtype=like.dtype)

  inputs = model.family.inputs(model.config)
  return {name: draw(name, like) for name, like in inputs.items()}


def probed(model: Loaded) -> Callable[[Any, Adapter], jax.Array]:
  """The function (params, adapter) -> float32 logits of a model over its `probe`."""
  module = model.module.clone(dtype=jnp.dtype("float32"))

  @jax.jit
  def apply(params: Any, adapter: Adapter, inputs: Any) -> jax.Array:
    forward = lambda params, inputs: module.apply({"params": params}, **inputs)
    found = lx.adapt(forward, lx.LoraConfig()).apply(params, adapter, inputs)
    return found.astype(jnp.float32)

  inputs = probe(model)

  def logits(params: Any, adapter: Adapter) -> jax.Array:
    # Products in full, so that other devices find the same numbers.
    with jax.default_matmul_precision("highest"):
      return apply(params, adapter, inputs)

  return logits


def _figures(shares: Mapping[str, tuple[float, float]], error: float | None) -> Figures:
  total = sum(square for _, square in shares.values())
  share = sum(product for product, _ in shares.values()) / total if total else 1.0
  each = [(product / square, path) for path, (product, square) in shares.items()]
  return Figures(share, min(each, default=None), error)

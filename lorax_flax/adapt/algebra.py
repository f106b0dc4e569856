"""Sums of adapters, by every type of PEFT's add_weighted_adapter: the result is a LoRA.

A kernel that fewer adapters change is the sum of theirs. Types:

  linear             a = Σ ±√|s_i| a_i and b = Σ √|s_i| b_i, s_i an adapter's weight
                     times its scale; so with cross terms a_i b_j
  cat                the factors side by side: exact, of the sum of the ranks
  svd                Σ s_i a_i b_i cut to a rank: exact to the error that is reported
  magnitude_prune    as linear, each factor's largest entries alone
  ties               and of those, at each place, the mean over the elected sign
  dare_linear        as linear, random entries alone, divided by the density
  dare_ties          and of those, the mean over the elected sign
  …_svd              the same of the changes a b instead of the factors, cut to a rank

One adapter and the weight -1 is its negation. What ends in svd takes any method, by its
change of the kernel; PEFT takes LoRA alone, and leaves DoRA's magnitudes out.
"""

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.adapt import stacking
from lorax_flax.adapt.paths import PyTree, arrays
from lorax_flax.adapt.stacking import Index
from lorax_flax.errors import LoraxError, check_known, unknown
from lorax_flax.methods import Adapter, Delta, KernelDelta, LoRA
from lorax_flax.methods.axes import by_role
from lorax_flax.quant import dense

# What each merge does before it sums: the pruning, and whether signs are elected.
_MERGES = {
  "linear": ("", False),
  "magnitude_prune": ("largest", False),
  "ties": ("largest", True),
  "dare_linear": ("random", False),
  "dare_ties": ("random", True),
}
TYPES = ("svd", "cat", *_MERGES, *(f"{name}_svd" for name in [*_MERGES][1:]))
MAJORITIES = ("total", "frequency")
_IN, _OUT = LoRA.trained


class Place(NamedTuple):
  """One matrix of one adapter, which is pruned by itself.

  Attributes:
    path: of the kernel.
    layer: its index on the kernel's stack axes.
    adapter: its number.
    name: of the factor; "delta" for the change itself.
  """

  path: str
  layer: Index
  adapter: int
  name: str


# True at the entries that random pruning keeps, of a matrix of this shape.
Keep = Callable[[Place, tuple[int, ...]], np.ndarray]


class Combined(NamedTuple):
  """A sum of adapters.

  Attributes:
    adapter: LoRA of the scale 1 and no dropout, and what is trained in full or by rows
      where all have the same.
    errors: what an SVD cut off, as a share of the change's Frobenius norm, by path.
  """

  adapter: Adapter
  errors: dict[str, float]


def bernoulli(density: float, seed: int) -> Keep:
  """Random entries, as a function of the seed and the place alone."""

  def keep(place: Place, shape: tuple[int, ...]) -> np.ndarray:
    words = zlib.crc32(f"{place.path} {place.name}".encode()), place.adapter
    return np.random.default_rng([seed, *words, *place.layer]).random(shape) < density

  return keep


def keep_largest(x: np.ndarray, density: float) -> np.ndarray:
  """True at the int(density * size) entries of the largest magnitude."""
  order = np.argsort(-np.abs(x), axis=None, kind="stable")
  kept = np.zeros(x.size, bool)
  kept[order[: int(density * x.size)]] = True
  return kept.reshape(x.shape)


def weighted_sum(
  tensors: Iterable[np.ndarray], weights: Sequence[float], majority: str | None = None
) -> np.ndarray:
  """The sum of weights times tensors of one shape.

  Args:
    majority: None, or how each place elects a sign before weighting, + in a draw: by
      the "total" of the values or the "frequency" of the signs. The sum is then over
      the tensors of that sign, divided by their number.
  """
  stacked = np.stack([*tensors])
  terms = np.asarray(weights, np.float32)[:, None, None] * stacked
  if majority is None:
    return terms.sum(0)
  votes = stacked if majority == "total" else np.sign(stacked)
  agree = np.sign(stacked) == np.where(votes.sum(0) >= 0, 1, -1)
  return (terms * agree).sum(0) / np.maximum(agree.sum(0), 1)


def combine_adapters(
  params: PyTree,
  adapters: Sequence[Adapter],
  weights: Sequence[float],
  combination: str = "svd",
  *,
  rank: int | None = None,
  density: float | None = None,
  majority: str | None = None,
  keep: Keep | None = None,
) -> Combined:
  """The weighted sum of adapters; see the module for the types.

  Args:
    params: the base, for the kernels' shapes, and their values where a method other
      than LoRA has need of them.
    adapters, weights: in the same order; weights may be negative.
    combination: a type, of `TYPES`.
    rank: the most that an SVD keeps; the largest of the adapters' by default.
    density: the share that pruning keeps, above 0 and at most 1.
    majority: of `MAJORITIES`, how ties elects signs; "total" by default.
    keep: the entries that random pruning keeps: see `bernoulli`.

  Raises:
    LoraxError: an option missing, or of another type; at one kernel, different ranks
      in a type that sums factors, or another method than LoRA; a bias, which a LoRA
      has no place for; what is trained in full or by rows, unless it is the same in all
      adapters.
  """
  check_known("type of combination", combination, TYPES)
  prunes, elects = _MERGES.get(combination.removesuffix("_svd"), ("", False))
  is_svd, is_random = combination.endswith("svd"), prunes == "random"
  check = partial(_check_option, combination)
  check("rank", rank, has=is_svd)
  check("density", density, has=bool(prunes), needs=bool(prunes))
  check("majority", majority, has=elects)
  check("keep", keep, has=is_random, needs=is_random)
  if majority is not None:
    check_known("majority", majority, MAJORITIES)
  if density is not None and not 0 < density <= 1:
    raise LoraxError(f"density must be above 0 and at most 1, not {density}")
  if not adapters or len(weights) != len(adapters) or not np.isfinite(weights).all():
    raise LoraxError(
      f"{len(adapters)} adapters need as many finite weights, not {list(weights)}"
    )
  targets = [d for a in adapters for d in a.values() if isinstance(d, KernelDelta)]
  rank = max((d.rank for d in targets), default=1) if rank is None else rank
  if rank < 1:
    raise LoraxError(f"rank must be at least 1, not {rank}: give that of the result")

  merge = _merge(density, keep, (majority or "total") if elects else None)
  join: _Join = partial(_factor_by_factor, merge=merge)
  if combination == "cat":
    join = _side_by_side
  elif is_svd:
    join = partial(_cut, rank=rank, merge=None if combination == "svd" else merge)
  found, leaves = _without_factors(adapters), arrays(params)
  errors: dict[str, float] = {}
  for path in dict.fromkeys(path for each in adapters for path in each):
    if path not in found:
      deltas = _at(path, adapters, leaves, is_svd)
      found[path], lost = _joined(path, deltas, weights, leaves[path], join)
      errors |= {path: lost} if is_svd else {}
  return Combined(found, errors)


def as_lora(params: PyTree, adapter: Adapter, rank: int) -> Combined:
  """An adapter of any method as LoRA of a rank, by an SVD of its changes.

  Raises:
    LoraxError: as `combine_adapters`.
  """
  return combine_adapters(params, [adapter], [1.0], "svd", rank=rank)


class _Term(NamedTuple):
  """One adapter's part of a sum at one layer.

  Attributes:
    place: of its change.
    weight: of the adapter.
    first: LoRA's factor, (in, r); of another method the change itself, (in, out).
    second: LoRA's factor, (r, out); None of another method.
    scale: of the factors' product.
  """

  place: Place
  weight: float
  first: np.ndarray
  second: np.ndarray | None = None
  scale: float = 1.0

  def factors(self) -> tuple[np.ndarray, np.ndarray]:
    assert self.second is not None
    return self.first, self.second

  def dense(self) -> np.ndarray:
    if self.second is None:
      return self.first
    return self.first @ self.second * np.float32(self.scale)


class _Sum(NamedTuple):
  """Factors of one layer, and the squared norms of what was lost and of all."""

  first: np.ndarray
  second: np.ndarray
  lost: float = 0.0
  total: float = 1.0


_Join = Callable[[Sequence[_Term]], _Sum]
_Merge = Callable[[Sequence[Place], Sequence[np.ndarray], Sequence[float]], np.ndarray]


def _merge(density: float | None, keep: Keep | None, majority: str | None) -> _Merge:
  """The pruning and the sum of a type, of matrices alike."""

  def pruned(place: Place, x: np.ndarray) -> np.ndarray:
    if density is None:
      return x
    if keep is None:
      return x * keep_largest(x, density)
    return x * keep(place, x.shape) / np.float32(density)

  def merge(places, matrices, weights):
    return weighted_sum(map(pruned, places, matrices), weights, majority)

  return merge


def _side_by_side(terms: Sequence[_Term]) -> _Sum:
  """The exact sum, of the sum of the ranks."""
  first, second = zip(*(term.factors() for term in terms), strict=True)
  scales = [np.float32(term.weight * term.scale) for term in terms]
  a = np.concatenate([x * s for x, s in zip(first, scales, strict=True)], axis=1)
  return _Sum(a, np.concatenate(second))


def _factor_by_factor(terms: Sequence[_Term], merge: _Merge) -> _Sum:
  """The merges of the first and of the second factors, each by itself."""
  first, second = zip(*(term.factors() for term in terms), strict=True)
  if len(ranks := sorted({len(b) for b in second})) > 1:
    raise LoraxError(
      f"factors of the ranks {ranks} at {terms[0].place.path} cannot be summed: cat and"
      " the types that end in svd take any ranks"
    )
  scales = [term.weight * term.scale for term in terms]
  roots = [math.sqrt(abs(s)) for s in scales]
  # On one side alone, since two signs would cancel.
  signed = [math.copysign(root, s) for root, s in zip(roots, scales, strict=True)]
  places = lambda name: [term.place._replace(name=name) for term in terms]
  return _Sum(merge(places(_IN), first, signed), merge(places(_OUT), second, roots))


def _cut(terms: Sequence[_Term], rank: int, merge: _Merge | None) -> _Sum:
  """The nearest factors of a rank to a merge of changes; None: to their plain sum."""
  if merge is None and all(term.second is not None for term in terms):
    # Of the small core between orthonormal bases: the product is not formed.
    a, b, *_ = _side_by_side(terms)
    (left, a), (right, b) = np.linalg.qr(a), np.linalg.qr(b.T)
    u, s, v = np.linalg.svd(a @ b.T, full_matrices=False)
    u, v = left @ u, v @ right.T
  else:
    places, weights = [t.place for t in terms], [t.weight for t in terms]
    merge = merge or _merge(None, None, None)
    change = merge(places, [term.dense() for term in terms], weights)
    u, s, v = np.linalg.svd(change, full_matrices=False)
  squares = np.square(s, dtype=np.float64)
  return _Sum(
    u[:, :rank], s[:rank, None] * v[:rank], squares[rank:].sum(), squares.sum()
  )


def _joined(
  path: str,
  deltas: Mapping[int, KernelDelta],
  weights: Sequence[float],
  leaf: Any,
  join: _Join,
) -> tuple[KernelDelta, float]:
  """The sum of the deltas of one kernel, and the share of it that is lost."""
  kernel_roles = next(iter(deltas.values())).roles
  axes = by_role(kernel_roles)
  stack, ins, outs = ([leaf.shape[i] for i in axes[r]] for r in ("stack", "in", "out"))
  terms: dict[Index, list[_Term]] = {}
  for i, delta in deltas.items():
    for index, parts in _layers(delta, leaf):
      term = _Term(Place(path, index, i, "delta"), weights[i], *parts)
      terms.setdefault(index, []).append(term)
  sums = {index: join(terms[index]) for index in sorted(terms)}
  layers = {
    index: {_IN: each.first.reshape(*ins, -1), _OUT: each.second.reshape(-1, *outs)}
    for index, each in sums.items()
  }
  roles = tuple(role for role in kernel_roles if role != "stack")
  ones = [1.0] * len(layers)
  summed = stacking.stack(LoRA, layers, ones, roles, stack)
  lost, total = (sum(getattr(s, n) for s in sums.values()) for n in ("lost", "total"))
  return replace(summed, roles=kernel_roles), math.sqrt(lost / total) if total else 0.0


def _layers(delta: KernelDelta, leaf: Any) -> Iterator[tuple[Index, tuple]]:
  """Each layer that a delta changes, with the last fields of its term."""
  stack: list[Sequence[int]] = [range(n) for n in delta.scales().shape]
  if delta.layers is not None:
    stack[0] = delta.layers
  indices = itertools.product(*stack)
  if not _is_lora(delta):
    before = dense(leaf)
    after = delta.merged(before)
    change = np.asarray(delta.matrices(after - before.astype(jnp.float32)))
    yield from ((i, (change[stacking.place_of(delta, i)],)) for i in indices)
    return
  for index in indices:
    leaves, scale, rank = stacking.unstack(delta, index)
    a, b = leaves[_IN].reshape(-1, rank), leaves[_OUT].reshape(rank, -1)
    yield index, (a, b, float(scale))


def _is_lora(delta: Delta) -> bool:
  return type(delta) is LoRA


def _check_option(
  combination: str, name: str, value: Any, *, has: bool, needs: bool = False
) -> None:
  if value is not None and not has:
    raise LoraxError(f"{name} does nothing in {combination}: leave it out")
  if value is None and needs:
    raise LoraxError(f"{combination} needs {name}")


def _at(
  path: str, adapters: Sequence[Adapter], leaves: Mapping[str, Any], is_svd: bool
) -> dict[int, KernelDelta]:
  """The deltas of one kernel by their adapters' numbers, checked."""
  if path not in leaves:
    raise LoraxError(unknown("adapter path", path, leaves))
  found = {}
  for i, adapter in enumerate(adapters):
    delta = adapter.get(path)
    if not isinstance(delta, KernelDelta):
      continue
    delta.check(path, leaves[path].shape)
    kind = type(delta).__name__
    if delta.has_bias:
      raise LoraxError(f"{path}: {kind} adds a bias, which a LoRA has no place for")
    if not is_svd and not _is_lora(delta):
      raise LoraxError(
        f"{path}: {kind} has no factors to sum: choose a type that ends in svd"
      )
    found[i] = delta
  if len(roles := {delta.roles for delta in found.values()}) > 1:
    raise LoraxError(f"{path}: the adapters take its axes for {sorted(roles)}")
  return found


def _without_factors(adapters: Sequence[Adapter]) -> Adapter:
  """Deltas in full or of rows, which must be the same in all adapters."""
  found: Adapter = {}
  for adapter in adapters:
    found |= {p: d for p, d in adapter.items() if not isinstance(d, KernelDelta)}
  for path, delta in found.items():
    if not all(path in each and _equal(each[path], delta) for each in adapters):
      raise LoraxError(
        f"{path} is trained in full or by rows, and differs between the adapters: only"
        " factors are summed"
      )
  return found


def _equal(one: Delta, other: Delta) -> bool:
  tree: Any = jax.tree.structure(one)
  return tree == jax.tree.structure(other) and all(
    map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other))
  )

"""The plan of an adapter, settled before anything is made: targets, roles, ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from lorax_flax import text_table
from lorax_flax.adapt import choice, measured
from lorax_flax.adapt import targets as tg
from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.interpret import roles as disc
from lorax_flax.adapt.interpret.layout_rules import Unsupported
from lorax_flax.adapt.paths import path_key
from lorax_flax.adapt.ranks import settle
from lorax_flax.errors import LoraxError, listing, prefixed, unknown
from lorax_flax.methods import METHODS, Adapter, Rows, Tuned
from lorax_flax.quant import dense, is_quantized


@dataclass(frozen=True)
class Target:
  """One weight that gets a delta.

  Attributes:
    roles: "in", "out" or "stack" for each axis of `shape`.
    rank: of the factors; `ranks` where those of the layers differ, the rest zeros.
    alpha, scale: one for all layers, or one for each.
    layers: the indices on the leading stack axis that are adapted; None for all.
    materialized: the primitives before which W + delta is formed.
    method: a key of `METHODS`.
    options: of the method, all of them.
    bias: the name, in the weight's module, of the base's bias that a method with a bias
      of its own is merged into.
    measured: what a start that looks at data was given; None of others.
  """

  path: str
  shape: tuple[int, ...]
  roles: tuple[str, ...]
  style: str
  rank: int
  alpha: float | tuple[float, ...]
  scale: float | tuple[float, ...]
  ranks: tuple[int, ...] | None = None
  layers: tuple[int, ...] | None = None
  materialized: tuple[str, ...] = ()
  method: str = "lora"
  options: Mapping[str, Any] = field(default_factory=dict)
  bias: str = "bias"
  measured: Any = None

  @property
  def starts_from(self) -> str:
    """The source of the first factors; see `KernelDelta.starts_from`."""
    if self.style == "eva":
      return "inputs"
    return METHODS.of_targets(self.method, self.options).starts_from

  def key(self, key: jax.Array) -> jax.Array:
    """A key of this target alone, whatever the others are."""
    return path_key(key, self.path)

  @property
  def size(self) -> int:
    """Number of trained parameters, those in common with other targets included."""
    method = METHODS.of_targets(self.method, self.options)
    pairs = zip(self.shape, self.roles, strict=True)
    stack = [n for n, role in pairs if role == "stack"]
    if self.layers is not None:
      stack[0] = len(self.layers)
    ranks = self.ranks or (self.rank,) * (stack[0] if stack else 1)

    def sizes(rank: int) -> dict[str, int]:
      shapes = method.layer_shapes(replace(self, rank=rank))
      return {name: math.prod(shape) for name, shape in shapes.items()}

    common = sum(sizes(self.rank)[name] for name in method.common)
    own = sum(sum(sizes(rank).values()) - common for rank in ranks)
    return math.prod(stack[1:]) * own + common


@dataclass(frozen=True)
class RowsTarget:
  """One table of which some rows are trained.

  Attributes:
    indices: numbers of the rows along `axis`.
    roles: "in" or "out" for each of the two axes.
  """

  path: str
  shape: tuple[int, ...]
  indices: tuple[int, ...]
  roles: tuple[str, ...]
  axis: int


@dataclass(frozen=True)
class Plan:
  """The targets, the leaves trained in full, and what was left out and why.

  Attributes:
    tuned: paths of the leaves that are trained in full.
    heads: paths of the output heads that "all-linear" left out.
    dropout: rate on the input of each delta.
    rows: the tables of which some rows are trained.
    tuned_layers: of stacked leaves, the layers that are trained in full.
    left_out: path to (shape, why), for each weight of two or more axes that
      "all-linear" leaves out, and for what the targets name that is excluded or is no
      kernel.
  """

  targets: tuple[Target, ...]
  tuned: tuple[str, ...]
  heads: tuple[str, ...]
  dropout: float
  rows: tuple[RowsTarget, ...] = ()
  tuned_layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
  left_out: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)

  def _in_full(self, path: str) -> str:
    layers = self.tuned_layers.get(path)
    return "in full" if layers is None else f"layers {_listed(layers)} in full"

  def __str__(self) -> str:
    rows: list[tuple[str, ...]] = []
    for t in self.targets:
      note = (
        f" (W + delta formed at {', '.join(t.materialized)})" if t.materialized else ""
      )
      rows.append(
        (t.path + note, str(t.shape), " ".join(t.roles),
         _listed(t.ranks or t.rank), _listed(t.alpha), f"{t.size:,}")
      )  # fmt: skip
    rows += [
      (r.path, str(r.shape), " ".join(r.roles), "", "", f"{len(r.indices)} rows")
      for r in self.rows
    ]
    rows += [(path, "", "", "", "", self._in_full(path)) for path in self.tuned]
    header = ("path", "shape", "roles", "rank", "alpha", "trained")
    left_out = [f"left out: {p} {s}: {why}" for p, (s, why) in self.left_out.items()]
    return "\n".join([text_table.render(header, rows), *left_out])

  def summary(self) -> str:
    """A line of what was left out, by reason; "" where nothing was."""
    by_reason: dict[str, list[str]] = {}
    for path, (_, why) in self.left_out.items():
      by_reason.setdefault(why, []).append(path)
    return "; ".join(f"{listing(p, 4)} ({why})" for why, p in by_reason.items())


def _tuned_layers(
  config: LoraConfig,
  leaves: Mapping[str, Any],
  tuned: Sequence[str],
  targets: Sequence[Target],
  biases: Mapping[str, Sequence[str]],
) -> dict[str, tuple[int, ...]]:
  """The layers of a stacked leaf that are trained in full, where not all are."""
  found = {}
  for path, layers in config.tuned_layers.items():
    if path not in tuned:
      raise LoraxError(unknown("tuned_layers: tuned path", path, tuned))
    if max(layers, default=0) >= leaves[path].shape[0]:
      raise LoraxError(
        f"tuned_layers: {path!r} has {leaves[path].shape[0]} layers, not {max(layers)}"
      )
    found[path] = tuple(layers)
  if config.bias == "lora_only":
    for t in targets:
      if t.layers is not None:
        found |= {b: t.layers for b in biases[t.path] if b not in tuned}
  return found


def _listed(value: Any) -> str:
  """A table's cell: one number, or one for each layer."""
  return " ".join(f"{x:g}" for x in (value if isinstance(value, tuple) else (value,)))


def make_plan(
  config: LoraConfig,
  jaxpr: Any,
  leaves: Mapping[str, Any],
  num_args: int,
) -> tuple[Plan, list[str]]:
  """Settles what a config means for a traced function.

  Args:
    jaxpr: of the function, its first operands the leaves in order, then num_args of
      data.
    leaves: the parameters by path, arrays or ShapeDtypeStructs.

  Returns:
    The plan, and the paths of the targets and rows that only a trace of the adapted
    function and its gradient can tell to be followed everywhere.

  Raises:
    LoraxError: a pattern that matches nothing, a target that no contraction consumes.
  """
  paths = list(leaves)
  floating = [p for p in paths if jnp.issubdtype(leaves[p].dtype, jnp.floating)]
  stack_axes = _stack_axes(config, leaves)
  inputs = range(len(paths), len(paths) + num_args)

  def look(chosen: Sequence[str]) -> disc.Discovery:
    weights = {
      i: (p, stack_axes.get(p, ())) for i, p in enumerate(paths) if p in set(chosen)
    }
    return disc.discover(jaxpr, weights, inputs)

  tuned = tg.select("tuned", config.tuned, floating, depth=None) if config.tuned else []
  if stored := [path for path in tuned if is_quantized(leaves[path])]:
    raise LoraxError(
      f"tuned: {listing(stored, 4)} can't be trained in full, being quantised: load the"
      " base without quant"
    )
  indices = _rows(config, floating)
  chosen = choice.choose(config, look, leaves, {*tuned}, {*indices})
  if twice := sorted(indices.keys() & {*tuned, *chosen.paths}):
    raise LoraxError(
      f"rows: {listing(twice)} is among the targets or trained in full; a table whose"
      " rows are trained cannot be either as well"
    )
  found = look([*chosen.paths, *indices])
  consumed = found.usage
  options = _options(config, chosen.paths)
  targets = [
    _target(config, p, tuple(leaves[p].shape), found, stack_axes.get(p, ()), options[p])
    for p in chosen.paths
  ]
  if config.layers is not None:
    targets = _in_layers(config, targets)
  adapted = [t.path for t in targets]
  tg.check_patterns_used("rank_pattern", config.rank_pattern, adapted)
  tg.check_patterns_used("alpha_pattern", config.alpha_pattern, adapted)
  method = METHODS.of_targets(config.method, config.options)
  added_to: dict[str, frozenset[str]] = dict.fromkeys(floating, frozenset())
  finds_bias = method.has_bias or method.scales_bias
  if config.bias != "none" or finds_bias:
    usage = choice.told_apart(look, floating).usage
    added_to = {p: usage[p].added_to for p in floating}
  own_biases = {p: tg.biases_of(p, floating, added_to) for p in adapted}
  if finds_bias:
    targets = [replace(t, bias=_beside(t.path, own_biases[t.path])) for t in targets]
  biases = tg.biases(config, floating, adapted, added_to)
  in_full = tuple(p for p in floating if p in {*tuned, *biases})
  rows = tuple(
    _rows_target(p, tuple(leaves[p].shape), indices[p], found) for p in indices
  )
  if not targets and not in_full and not rows:
    raise LoraxError("nothing to train: LoraConfig has no targets, no tuned, no rows")
  layers = _tuned_layers(config, leaves, tuned, targets, own_biases)
  layers = {path: layers[path] for path in in_full if path in layers}
  to_try = [p for p in [*adapted, *indices] if not consumed[p].is_plain]
  plan = Plan(
    tuple(targets),
    in_full,
    chosen.heads,
    config.dropout,
    rows,
    layers,
    {p: (tuple(leaves[p].shape), why) for p, why in chosen.left_out.items()},
  )
  return plan, to_try


def _beside(path: str, biases: Sequence[str]) -> str:
  """The name that a kernel's module has for its bias; "bias" where it has no one."""
  module = path.rpartition("/")[0]
  names = [b.rpartition("/")[2] for b in biases if b.rpartition("/")[0] == module]
  return names[0] if len(names) == 1 else "bias"


def _stack_axes(config: LoraConfig, leaves) -> dict[str, tuple[int, ...]]:
  found = {}
  for pattern, axes in config.stack_axes.items():
    for path in tg.select("stack_axes", pattern, list(leaves), depth=1):
      n = len(leaves[path].shape)
      if any(not -n <= a < n for a in axes):
        raise LoraxError(f"stack_axes: {path!r} has {n} axes, not {list(axes)}")
      found[path] = tuple(a % n for a in axes)
  return found


def _rows(config: LoraConfig, floating: list[str]) -> dict[str, tuple[int, ...]]:
  found: dict[str, tuple[int, ...]] = {}
  for pattern, numbers in config.rows.items():
    for path in tg.select("rows", [pattern], floating, depth=2):
      if path in found:
        raise LoraxError(f"rows: {path!r} is named twice")
      found[path] = tuple(numbers)
  return found


def _rows_target(path, shape, indices, found: disc.Discovery) -> RowsTarget:
  roles = _roles(path, shape, found)
  if sorted(roles) != ["in", "out"]:
    raise LoraxError(f"rows: {path!r} of shape {shape} is no table of rows")
  # The axis of the tokens: where they are looked up, or else told apart.
  looked_up = "gather" in found.usage[path].primitives
  axis = roles.index("in" if looked_up else "out")
  if max(indices) >= shape[axis]:
    raise LoraxError(
      f"rows: {path!r} has {shape[axis]} rows, and {max(indices)} is requested"
    )
  return RowsTarget(path, shape, indices, roles, axis)


def _roles(
  path, shape, found: disc.Discovery, may_materialize=False
) -> tuple[str, ...]:
  """The roles of a path that is used, and only where a delta can follow."""
  usage = found.usage[path]
  if usage.problems and not may_materialize:
    primitive, why = next(iter(usage.problems.items()))
    raise LoraxError(
      f"target {path!r} is used by {primitive!r}, where a delta cannot follow: {why}."
      " Exclude it, or pass on_unsupported='materialize' to form W + delta there"
    )
  if not usage.sites and not usage.problems:
    raise LoraxError(f"target {path!r} is never used by the function")
  try:
    return disc.roles(found, path, len(shape)) if usage.sites else _guessed(shape, path)
  except Unsupported as e:
    raise LoraxError(f"target {path!r} cannot have a low-rank delta: {e}") from e


def _options(config: LoraConfig, paths: Sequence[str]) -> dict[str, dict[str, Any]]:
  """The method's options, all of them, of each target."""
  method = METHODS.of_targets(config.method, config.options)
  options = {**method.options, **config.options}
  named = {
    name: tg.select(name, options[name], paths, depth=2) for name in method.selections
  }
  return {p: options | {name: p in named[name] for name in named} for p in paths}


def _target(config, path, shape, found: disc.Discovery, stack_axes, options) -> Target:
  usage = found.usage[path]
  roles = _roles(path, shape, found, config.on_unsupported == "materialize")
  roles = tuple("stack" if i in stack_axes else r for i, r in enumerate(roles))
  style = "embedding" if "gather" in usage.primitives else config.init
  method = METHODS.of_targets(config.method, config.options)
  if style == "embedding" and not method.takes_tables:
    raise LoraxError(
      f"{config.method}: target {path!r} is looked up, and the method is not defined"
      " for tables: exclude it, or choose lora"
    )
  target = Target(
    path,
    shape,
    roles,
    style,
    *settle(config, path, shape, roles),
    tuple(usage.problems),
    config.method,
    options,
  )
  if target.ranks is not None and not method.pads_rank:
    raise LoraxError(
      f"{config.method} has one rank for all layers of {path!r}, not {target.ranks}"
    )
  with prefixed(f"target {path!r}"):
    method.layer_shapes(target)  # which says what the kernel does not allow
  return target


def _guessed(shape, path) -> tuple[str, ...]:
  """Roles where no rule ever sees the full weight: the last axis is kept."""
  if len(shape) < 2:
    raise LoraxError(f"target {path!r} of shape {shape} has no two axes to factor")
  return ("in",) * (len(shape) - 1) + ("out",)


def _in_layers(config: LoraConfig, targets: list[Target]) -> list[Target]:
  requested = sorted(set(config.layers or ()))
  kept, known = [], set()
  for t in targets:
    layer = tg.layer_of(t.path, config.layers_pattern)
    if layer is not None:
      known.add(layer)
      if layer in requested:
        kept.append(t)
    elif "stack" in t.roles:
      length = t.shape[t.roles.index("stack")]
      known |= set(range(length))
      inside = tuple(i for i in requested if i < length)
      if inside:
        kept.append(replace(t, layers=inside))
  missing = [i for i in requested if i not in known]
  if missing or not kept:
    raise LoraxError(
      f"layers: no target is in {missing or requested}; the targets' layers are"
      f" {sorted(known) or 'not numbered'}"
    )
  return kept


def start(
  plan: Plan,
  key: jax.Array,
  leaves: Mapping[str, Any],
  seen: Mapping[str, Any] | None = None,
) -> Adapter:
  """The adapter of a plan, a function of (key, path) for each target.

  Args:
    leaves: the parameters by path.
    seen: what was measured over data, by path, for the starts that look at it:
      gradients of a loss, or what `adapt.measured` makes of the inputs.

  Raises:
    LoraxError: a start that looks at data, without it.
  """
  adapter: Adapter = {}
  for t in plan.targets:
    if t.starts_from != "kernel":
      if seen is None:
        raise LoraxError(_NEEDS_DATA[t.starts_from].format(t.method))
      t = replace(t, measured=seen[t.path])
    method = METHODS.of_targets(t.method, t.options)
    adapter[t.path] = method.start(key, leaves[t.path], t, plan)
  for r in plan.rows:
    adapter[r.path] = Rows.start(dense(leaves[r.path]), r.indices, r.roles, r.axis)
  for path in plan.tuned:
    adapter[path] = Tuned.start(dense(leaves[path]), plan.tuned_layers.get(path))
  return adapter


def abstract_start(plan: Plan, leaves: Mapping[str, Any]) -> Adapter:
  """The adapter of a plan as ShapeDtypeStructs; the leaves may be such too."""

  def made(leaves):
    blanks = {t.path: measured.blank(t, leaves[t.path]) for t in plan.targets}
    return start(plan, jax.random.key(0), leaves, blanks)

  return jax.eval_shape(made, dict(leaves))


_NEEDS_DATA = {
  "gradient": "{} starts from gradients of the loss, which are not given: use"
  " lorax_flax.init_from_gradients, or pissa or olora, which start from the kernel"
  " alone",
  "inputs": "{} starts from the inputs of its targets, which are not given: use "
  "lorax_flax.init_from_activations, or a start that looks at no data",
}

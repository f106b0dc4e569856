"""The configuration of the transform: targets, method, ranks and scales."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lorax_flax.errors import LoraxError, check_known, listing, unknown
from lorax_flax.methods import METHODS, KernelDelta, eva

BIAS = ("none", "all", "lora_only")
ON_UNSUPPORTED = ("error", "materialize")
# What `init_options` may hold, by start. "mica" is PEFT's, kept for its folders.
INIT: Mapping[str, Mapping[str, Any]] = {
  **{name: {} for name in ("uniform", "gaussian", "orthogonal", "mica")},
  "eva": eva.OPTIONS,
}


class KnowsPeft(Protocol):
  """A model that translates PEFT's names of its modules to paths and back.

  `models.registry.load` gives one; this package knows no model's names.
  """

  def from_peft(self, source: Any) -> "LoraConfig": ...

  def to_peft(self, config: "LoraConfig", adapter: Any) -> dict[str, Any]: ...


@dataclass(frozen=True)
class LoraConfig:
  """Targets, ranks and scales of an adapter.

  Paths are slash paths of the leaves of `params`, "encoder/layer_0/query/kernel".

  Attributes:
    targets: the weights that get a delta. A string is a regular expression that
      matches a whole path, or "all-linear": every weight that a contraction consumes,
      less the output head (found by tracing). A sequence holds suffixes: the end of a
      path, or of the path of the module that holds the weight ("query").
    exclude: the same rules; wins over `targets`.
    method: a key of `METHODS`, whose method all targets get: "lora"; "dora"
      trains a magnitude for each output beside the factors; "lora_bias" a bias on each
      second factor (PEFT's lora_bias), and takes no embeddings. The others are in
      `lorax_flax.methods`, a file each.
    options: the method's own options by name.
    rank, alpha: of every target, unless a pattern says otherwise; the delta is scaled
      by alpha / rank.
    rank_pattern, alpha_pattern: regular expression to value. The first that matches a
      path, or the path of its module, from any slash on (PEFT's rule). Of a stacked
      (scanned) weight it may be a sequence, a value for each layer; a layer of rank 0
      has no delta.
    use_rslora: scale by alpha / sqrt(rank) instead.
    use_dora, lora_bias: PEFT's names for method="dora" and method="lora_bias". They set
      `method`, and are None from then on.
    layers: only weights of these layers. A weight's layer is the first number in its
      path, or what `layers_pattern` captures; of a stacked (scanned) weight, the index
      on its stack axis.
    layers_pattern: regular expression with one group, the layer's number.
    tuned: weights trained in full beside the deltas, a new head for instance; rules as
      for `targets`. Here a string or an item may also name a module: all of it.
    tuned_layers: of stacked weights that are trained in full, path to the layers that
      are; the others are all trained. (A bias that `bias="lora_only"` trains is so in
      the layers that have factors.)
    rows: tables of which some rows are trained in place, as new tokens are: the end of
      a path, or of its module's, to the rows' numbers. Of a head's kernel they are the
      columns.
    bias: "none", "all" biases trained, or "lora_only", those beside a target.
    dropout: rate on the input of each delta; acts only where a key is given to `apply`.
    init: "uniform" (PEFT's default), "gaussian", "orthogonal", or "eva", which looks at
      a few batches (`init_from_activations`). "mica" says how PEFT started an adapter
      that was read. Starts that change the kernel are methods: "pissa", "corda", ….
    init_options: the start's own options by name: `methods.eva.OPTIONS`.
    stack_axes: regular expression (whole path) to axes that hold separate weights, for
      experts that no scan or batch axis gives away.
    on_unsupported: where a target is used by a primitive that has no rule, "error", or
      "materialize": form W + delta there, and report it.
  """

  targets: str | Sequence[str] = "all-linear"
  exclude: str | Sequence[str] = ()
  method: str = "lora"
  options: Mapping[str, Any] = field(default_factory=dict)
  rank: int = 8
  alpha: float = 8.0
  rank_pattern: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
  alpha_pattern: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
  use_rslora: bool = False
  use_dora: bool | None = None
  lora_bias: bool | None = None
  layers: Sequence[int] | None = None
  layers_pattern: str | None = None
  tuned: str | Sequence[str] = ()
  tuned_layers: Mapping[str, Sequence[int]] = field(default_factory=dict)
  rows: Mapping[str, Sequence[int]] = field(default_factory=dict)
  bias: str = "none"
  dropout: float = 0.0
  init: str = "uniform"
  init_options: Mapping[str, Any] = field(default_factory=dict)
  stack_axes: Mapping[str, Sequence[int]] = field(default_factory=dict)
  on_unsupported: str = "error"

  def __post_init__(self):
    self._resolve_aliases()
    self._check_used(METHODS.of_targets(self.method, self.options))
    for name, options in (
      ("bias", BIAS),
      ("on_unsupported", ON_UNSUPPORTED),
      ("init", INIT),
    ):
      if getattr(self, name) not in options:
        is_method = name == "init" and self.init in METHODS
        hint = f". {self.init!r} is a method: give method={self.init!r}" * is_method
        raise LoraxError(
          unknown(f"LoraConfig.{name}", getattr(self, name), options) + hint
        )
    for name in self.init_options:
      check_known(f"option of init={self.init!r}", name, INIT[self.init])
    for name, rank in {"rank": self.rank, **self.rank_pattern}.items():
      each, least = (rank, 0) if isinstance(rank, Sequence) else ((rank,), 1)
      if not all(isinstance(n, int) and n >= least for n in each) or not any(each):
        raise LoraxError(
          f"LoraConfig rank of {name!r} must be an int >= 1, not {rank!r}"
        )
    for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
      if not all(x > 0 for x in (alpha if isinstance(alpha, Sequence) else (alpha,))):
        raise LoraxError(f"LoraConfig alpha of {name!r} must be > 0, not {alpha!r}")
    for name, numbers in self.rows.items():
      valid = all(isinstance(n, int) and n >= 0 for n in numbers)
      if not valid or not 0 < len(numbers) == len(set(numbers)):
        raise LoraxError(
          f"LoraConfig.rows of {name!r} must be different ints >= 0, not {numbers!r}"
        )
    if not 0.0 <= self.dropout < 1.0:
      raise LoraxError(f"LoraConfig.dropout must be in [0, 1), not {self.dropout!r}")
    if self.layers_pattern is not None and self.layers is None:
      raise LoraxError("LoraConfig.layers_pattern does nothing without layers")
    patterns = [p for p in (self.targets, self.exclude, self.tuned) if _is_regex(p)]
    patterns += [*self.rank_pattern, *self.alpha_pattern, *self.stack_axes]
    patterns += [self.layers_pattern] if self.layers_pattern else []
    for pattern in patterns:
      try:
        re.compile(str(pattern))
      except re.error as e:
        raise LoraxError(
          f"LoraConfig: {pattern!r} is not a regular expression: {e}"
        ) from e
    if self.layers_pattern and re.compile(self.layers_pattern).groups != 1:
      raise LoraxError("LoraConfig.layers_pattern needs one group, the layer's number")

  def _check_used(self, method: type[KernelDelta]) -> None:
    """Refuses a rank, a scale or a start that the method would not look at."""
    default = LoraConfig.__dataclass_fields__
    if not method.has_rank and (
      self.rank_pattern or self.rank != default["rank"].default
    ):
      raise LoraxError(
        f"LoraConfig.rank does nothing in {self.method}, which has no rank: leave it"
        f" out. Its options: {listing(method.options) or 'none'}"
      )
    if not method.takes_init and self.init != "uniform":
      raise LoraxError(
        f"LoraConfig.init={self.init!r} does nothing in {self.method}: leave it out"
      )
    given = self.alpha not in (default["alpha"].default, self.rank)
    if "scale" not in method.axes and (given or self.alpha_pattern or self.use_rslora):
      raise LoraxError(
        f"LoraConfig.alpha={self.alpha:g} does nothing in {self.method}, whose delta is"
        " not scaled by alpha / rank: leave it, alpha_pattern and use_rslora out"
      )

  def _resolve_aliases(self) -> None:
    """Sets `method` by `use_dora` or `lora_bias`, as PEFT makes them of LoRA."""
    aliases = {"use_dora": "dora", "lora_bias": "lora_bias"}
    given = {
      a: x for name, a in aliases.items() if (x := getattr(self, name)) is not None
    }
    requested = [method for method, value in given.items() if value]
    if len(requested) > 1:
      raise LoraxError("LoraConfig: use_dora and lora_bias do not go together")
    method = requested[0] if requested and self.method == "lora" else self.method
    for name, alias in aliases.items():
      if given.get(alias, method == alias) != (method == alias):
        raise LoraxError(
          f"LoraConfig: {name}={given[alias]} contradicts method={self.method!r}"
        )
      object.__setattr__(self, name, None)
    object.__setattr__(self, "method", method)

  @classmethod
  def from_peft(cls, source: Any, model: KnowsPeft) -> "LoraConfig":
    """The config that makes here what PEFT's makes in torch, its names as paths.

    Args:
      source: a PEFT folder, or the content of its adapter_config.json.
      model: the base, as `lorax_flax.models.registry.load` gives it.

    Raises:
      LoraxError: a field that we cannot honour, a name that the model doesn't have.
    """
    return model.from_peft(source)

  def to_peft(self, adapter: Any, model: KnowsPeft) -> dict[str, Any]:
    """The content of adapter_config.json for an adapter made with this config.

    Args:
      adapter: as `Adapted.init` gives it.
      model: the base, as `lorax_flax.models.registry.load` gives it.

    Raises:
      LoraxError: something that PEFT has no form for.
    """
    return model.to_peft(self, adapter)


def with_tuned(config: LoraConfig, paths: Sequence[str]) -> LoraConfig:
  """The config with further paths trained in full."""
  if not paths:
    return config
  tuned = config.tuned
  if isinstance(tuned, str):
    return replace(config, tuned="|".join([f"(?:{tuned})", *map(re.escape, paths)]))
  return replace(config, tuned=(*tuned, *paths))


def _is_regex(patterns: str | Sequence[str]) -> bool:
  return isinstance(patterns, str) and patterns != "all-linear"

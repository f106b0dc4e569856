"""PEFT's LoraConfig: its fields, checked, and the modules that they match.

Facts from peft 0.21 (tuners/lora/config.py, tuners/tuners_utils.py, utils/other.py).
"""

import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorax_flax.errors import LoraxError, listing, unknown
from lorax_flax.hub.peft.names import ends_with, looked_up, several

CONFIG_FILE = "adapter_config.json"
LORA = "LORA"
SEQ_CLS = "SEQ_CLS"
# The base alone, without a head: its modules' names have no prefix.
FEATURE_EXTRACTION = "FEATURE_EXTRACTION"
# PEFT saves these in full for a sequence classifier, if the model has them.
HEAD_NAMES = ("classifier", "score")
ALL_LINEAR = "all-linear"
# PEFT's task_type, by the task of a family.
TASK_TYPES = {
  "sequence-classification": SEQ_CLS,
  "causal-lm": "CAUSAL_LM",
  "seq2seq-lm": "SEQ_2_SEQ_LM",
  "image-classification": None,
}
# Those of models whose outputs are labels of the full input, and of language models.
LABEL_TASKS = (SEQ_CLS,)
TEXT_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
# The task of a model, by the end of its class's name: PEFT notes the class where no
# task_type is given.
_TASKS_OF_CLASSES = {
  "ForTokenClassification": "TOKEN_CLS",
  "ForQuestionAnswering": "QUESTION_ANS",
  "ForMaskedLM": "MASKED_LM",
  "ForMultipleChoice": "MULTIPLE_CHOICE",
  "ForCausalLM": "CAUSAL_LM",
  "LMHeadModel": "CAUSAL_LM",
  "ForConditionalGeneration": "SEQ_2_SEQ_LM",
  "Model": FEATURE_EXTRACTION,
}
# PEFT's target_modules where a config has none, by model_type.
_ATTENTION = ("q_proj", "v_proj")
DEFAULT_TARGETS: Mapping[str, tuple[str, ...]] = {
  **dict.fromkeys(("bert", "roberta", "xlm-roberta"), ("query", "value")),
  "deberta-v2": ("query_proj", "value_proj"),
  "gpt2": ("c_attn",),
  **dict.fromkeys(("t5", "mt5"), ("q", "v")),
  **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _ATTENTION),
  "mixtral": _ATTENTION,
  **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _ATTENTION),
}
# Whose experts are stacked parameters, since transformers 5.
MIXTURES = ("mixtral", "qwen3_moe")
# Modules that PEFT takes for the input and the output embedding, by name alone.
EMBEDDING_NAMES = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class PeftConfig:
  """The fields of PEFT's configs that we honour, under the names of its LoraConfig.

  Other types' names for them are in each method's `PeftForm`.

  Module names are those of the PyTorch model ("bert.encoder.layer.0.output.dense").

  Attributes:
    r: None of a type that has no rank.
    lora_alpha: None of a type whose delta is not scaled.
    target_modules: a regular expression for full names, or "all-linear"; or names, each
      a full one or its end after a dot.
    exclude_modules: the same rules; wins.
    modules_to_save: ends of names; these modules are saved in full.
    layers_to_transform, layers_pattern: for target_modules in the form of names.
    rank_pattern, alpha_pattern: regular expression for the end of a name, to value.
    init_lora_weights: the initialisation; loading doesn't depend on it.
    fan_in_fan_out: targets are Conv1D, whose weight is (in, out); the factors are the
      same.
    use_dora: a magnitude for each output beside the factors.
    lora_bias: a bias on each second factor.
    target_parameters: names, or ends of them, of parameters that get factors though no
      module with a LoRA form holds them: stacked experts.
    trainable_token_indices: rows of the embedding that are trained; or by the end of a
      module's name.
    ensure_weight_tying: weights that are tied to a trained one are trained too.
    auto_mapping: the class of the wrapped model, where there is no task_type.
    peft_type: PEFT's name of the type.
    kept_ranks: of a type that prunes ranks, the name of a module's tensor to a bool for
      each of its ranks: whether the folder's tensors have it.
    options: of the method, those that the type has fields for, by our names.
  """

  r: int | None = 8
  lora_alpha: float | None = 8
  lora_dropout: float = 0.0
  target_modules: str | tuple[str, ...] | None = None
  exclude_modules: str | tuple[str, ...] | None = None
  modules_to_save: tuple[str, ...] | None = None
  layers_to_transform: int | tuple[int, ...] | None = None
  layers_pattern: str | tuple[str, ...] | None = None
  rank_pattern: Mapping[str, int] = field(default_factory=dict)
  alpha_pattern: Mapping[str, float] = field(default_factory=dict)
  bias: str = "none"
  use_rslora: bool = False
  fan_in_fan_out: bool = False
  use_dora: bool = False
  lora_bias: bool = False
  target_parameters: tuple[str, ...] | None = None
  trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
  ensure_weight_tying: bool = False
  init_lora_weights: bool | str = True
  task_type: str | None = None
  auto_mapping: Mapping[str, Any] | None = None
  base_model_name_or_path: str | None = None
  revision: str | None = None
  peft_type: str = LORA
  kept_ranks: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
  options: Mapping[str, Any] = field(default_factory=dict)

  def __post_init__(self):
    init = self.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
      raise LoraxError(
        f"{CONFIG_FILE}: init_lora_weights={init!r} subtracted its "
        "start from the base's weights, so the adapter is not one of this base: PEFT's "
        "save_pretrained(path_initial_model_for_weight_conversion=…) makes it one"
      )
    for name, hint in typing.get_type_hints(PeftConfig).items():
      value, within = getattr(self, name), _BOUNDS.get(name, lambda value: True)
      if not _has_type(value, hint) or not (value is None or within(value)):
        raise LoraxError(f"{CONFIG_FILE}: {name}={value!r} is not what PEFT writes")
    if isinstance(self.target_modules, str) and several(self.layers_to_transform):
      raise LoraxError(
        f"{CONFIG_FILE}: layers_to_transform needs target_modules as a list of names"
      )
    if self.use_dora and self.lora_bias:
      raise LoraxError(f"{CONFIG_FILE}: use_dora and lora_bias do not go together")
    if self.target_parameters and (
      self.lora_dropout or self.use_dora or self.lora_bias or self.fan_in_fan_out
    ):
      raise LoraxError(
        f"{CONFIG_FILE}: target_parameters go with none of lora_dropout, use_dora, "
        "lora_bias and fan_in_fan_out"
      )
    patterns = [*self.rank_pattern, *self.alpha_pattern]
    for rules in (self.target_modules, self.exclude_modules):
      patterns += [rules] if isinstance(rules, str) else []
    patterns += several(self.layers_pattern)
    for pattern in patterns:
      try:
        re.compile(pattern)
      except re.error as error:
        raise LoraxError(
          f"{CONFIG_FILE}: {pattern!r} is not a regular expression: {error}"
        ) from error

  @property
  def task(self) -> str | None:
    """The task_type, or what the class of the wrapped model tells of it."""
    name = str((self.auto_mapping or {}).get("base_model_class", ""))
    told = (t for end, t in _TASKS_OF_CLASSES.items() if name.endswith(end))
    return self.task_type or next(told, None)

  def rank(self, module: str) -> int:
    """The rank of one module's factors; 0 of a type that has none."""
    return looked_up(self.rank_pattern, module, self.r or 0)

  def alpha(self, module: str) -> float | None:
    return looked_up(self.alpha_pattern, module, self.lora_alpha)

  def scale(self, module: str) -> float:
    """The factor on the delta of one module."""
    rank, alpha = self.rank(module), self.alpha(module)
    if not rank or alpha is None:
      return 1.0
    return alpha / (math.sqrt(rank) if self.use_rslora else rank)

  def saved(self, names: Iterable[str]) -> list[str]:
    """The modules saved in full: those whose name ends so.

    Raises:
      LoraxError: one inside of another, which PEFT saves and then cannot load.
    """
    ends = tuple(several(self.modules_to_save))
    found = [name for name in names if name.endswith(ends)]
    for name in found:
      for outer in found:
        if name.startswith(f"{outer}."):
          raise LoraxError(
            f"{CONFIG_FILE}: modules_to_save mean {outer} and {name} inside of it, and "
            "PEFT cannot load such a folder: give the full name of one of them"
          )
    return found

  def is_named(self, name: str) -> bool:
    """True where target_modules, a list or an expression, name a module."""
    if self.target_modules is None:
      return False
    if isinstance(self.target_modules, str):
      return re.fullmatch(self.target_modules, name) is not None
    if name in self.target_modules:
      return True
    named = any(name.endswith(f".{end}") for end in self.target_modules)
    return named and self._in_layers(name)

  def is_excluded(self, name: str) -> bool:
    """True where a module never gets factors: it is excluded, or saved in full."""
    if isinstance(self.exclude_modules, str):
      excluded = re.fullmatch(self.exclude_modules, name) is not None
    else:
      excluded = any(ends_with(name, end) for end in several(self.exclude_modules))
    return excluded or any(
      re.match(rf"(^|.*\.){saved}($|\..*)", name)
      for saved in several(self.modules_to_save)
    )

  def targets(self, linear: Sequence[str], names: Sequence[str]) -> list[str]:
    """The modules that get factors, in the order of `names`.

    Args:
      linear: the modules of "all-linear".
      names: every module's name.
    """
    if self.is_all_linear:
      return [name for name in linear if not self.is_excluded(name)]
    return [n for n in names if not self.is_excluded(n) and self.is_named(n)]

  @property
  def is_all_linear(self) -> bool:
    every = isinstance(self.target_modules, str)
    return every and str(self.target_modules).lower() == ALL_LINEAR

  def selects(self, option: str, module: str) -> bool:
    """True where an option that names modules names this one, by PEFT's rule."""
    names = self.options.get(option, ())
    if isinstance(names, str):
      return re.fullmatch(names, module) is not None
    return module.endswith(tuple(names))

  def with_defaults(
    self,
    family: str,
    targets: Mapping[str, tuple[str, ...]] = DEFAULT_TARGETS,
    selected: Mapping[str, Mapping[str, tuple[str, ...]]] = types.MappingProxyType({}),
  ) -> "PeftConfig":
    """Fills in target_modules, and what else names modules, as PEFT does by model_type.

    PEFT has defaults where none are given, and names instead of an expression
    where experts are not modules that it could match.

    Args:
      targets: the type's target_modules by model type.
      selected: likewise, of each option that names modules.

    Raises:
      LoraxError: PEFT has no default for it either.
    """
    old = {"w1", "w2", "w3"} & {*several(self.target_modules)}
    if family in MIXTURES and old:
      raise LoraxError(
        f"{CONFIG_FILE}: target_modules name {listing(sorted(old))} of each expert, as "
        "before transformers 5, where experts are one parameter: load the adapter with "
        "a PEFT that converts it, save it there, and give that folder"
      )
    if family in MIXTURES and isinstance(self.target_modules, str):
      return self._with_experts()
    for option, by_family in selected.items():
      if option not in self.options:
        if family not in by_family:
          raise LoraxError(
            f"{CONFIG_FILE}: no {option} modules, and PEFT has no default for {family}"
          )
        options = {**self.options, option: by_family[family]}
        return replace(self, options=options).with_defaults(family, targets, selected)
    if self.target_modules is not None:
      return self
    if family in targets:
      return replace(self, target_modules=targets[family])
    if self.target_parameters:
      return self
    raise LoraxError(
      f"{CONFIG_FILE}: no target_modules, and PEFT has no default for {family}"
    )

  def _with_experts(self) -> "PeftConfig":
    """ "all-linear" of a mixture of experts, as PEFT spells it out.

    The two parts of gate_up_proj get a half of the rank each, so it is twice as large.
    """
    if not self.is_all_linear or self.r is None or self.lora_alpha is None:
      raise LoraxError(
        f"{CONFIG_FILE}: target_modules={self.target_modules!r} may or may not mean "
        "the experts: PEFT turns it into names for a mixture; give target_modules and "
        "target_parameters as names"
      )
    fused = r".*\.gate_up_proj"
    experts = ("gate.weight", "gate_up_proj", "down_proj")
    return replace(
      self,
      target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
      target_parameters=(*(self.target_parameters or ()), *experts),
      rank_pattern={**self.rank_pattern, fused: 2 * self.r},
      alpha_pattern={**self.alpha_pattern, fused: 2 * self.lora_alpha},
    )

  def names_an_embedding(self, names: Iterable[str]) -> bool:
    """True where PEFT takes some of these to mean the input or output embedding."""
    return any(name.rpartition(".")[2] in EMBEDDING_NAMES for name in names)

  def ties_targets(self) -> bool:
    """True where ensure_weight_tying gives factors to all modules of the embedding."""
    if not self.ensure_weight_tying or self.ties_saved():
      return False
    if isinstance(self.target_modules, str):
      return any(re.fullmatch(self.target_modules, name) for name in EMBEDDING_NAMES)
    return self.names_an_embedding(self.target_modules or ())

  def ties_saved(self) -> bool:
    """True where ensure_weight_tying saves all modules of the embedding in full."""
    return self.ensure_weight_tying and self.names_an_embedding(
      self.modules_to_save or ()
    )

  def saves_embeddings(self, names: Iterable[str]) -> bool:
    """True where PEFT saves the base's weights of the embeddings that have factors."""
    if self.trainable_token_indices is not None or self.is_all_linear:
      return False
    if isinstance(self.target_modules, str):
      ends = (name for name in names if name.rpartition(".")[2] in EMBEDDING_NAMES)
      return any(re.fullmatch(self.target_modules, name) for name in ends)
    return any(name in EMBEDDING_NAMES for name in self.target_modules or ())

  def is_parameter(self, key: str) -> bool:
    """True where a parameter, by its full key, gets factors."""
    return any(ends_with(key, end) for end in self.target_parameters or ())

  def _in_layers(self, name: str) -> bool:
    layers = self.layers_to_transform
    if layers is None or layers == ():
      return True
    found = None
    if patterns := several(self.layers_pattern):
      for pattern in patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", name):
          break
    else:
      found = re.match(r".*?\.[^.]*\.(?P<layer>\d+)\.", name)
    if found is None:
      return False
    layer = int(found["layer"])
    return layer == layers if isinstance(layers, int) else layer in layers


def with_heads(names: Sequence[str]) -> tuple[str, ...]:
  """modules_to_save of a sequence classifier."""
  return (*names, *(name for name in HEAD_NAMES if name not in names))


def describe_unknown_target(config: PeftConfig, names: Iterable[str]) -> str:
  """The message for target_modules that match nothing."""
  names = list(names)
  ends = sorted({name.rpartition(".")[2] for name in names})
  for target in several(config.target_modules):
    if not any(ends_with(name, target) for name in names):
      return f"{CONFIG_FILE}: {unknown('target module', target, ends)}"
  return f"{CONFIG_FILE}: target_modules match no module of this model: {listing(ends)}"


# Initialisations that leave the base as it is.
_INITS = ("gaussian", "eva", "orthogonal", "mica")
# Initialisations that change it: such an adapter belongs to the changed base.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _is_rank(value: int) -> bool:
  return 0 < value <= 1 << 20


# Bounds of fields beyond their types.
_BOUNDS: Mapping[str, Callable[[Any], bool]] = {
  "r": _is_rank,
  "lora_dropout": lambda value: 0 <= value < 1,
  "rank_pattern": lambda value: all(map(_is_rank, value.values())),
  "bias": lambda value: value in ("none", "all", "lora_only"),
  "trainable_token_indices": lambda value: all(
    min(rows, default=-1) >= 0 and len(rows) == len(set(rows))
    for rows in (value.values() if isinstance(value, Mapping) else [value])
  ),
  "init_lora_weights": lambda value: isinstance(value, bool) or value in _INITS,
}


def _has_type(value: Any, hint: Any) -> bool:
  """True where a value has an annotation's type; numbers are finite."""
  arguments = typing.get_args(hint)
  if isinstance(hint, types.UnionType):
    return any(_has_type(value, each) for each in arguments)
  if typing.get_origin(hint) is tuple:
    return isinstance(value, tuple) and all(_has_type(x, arguments[0]) for x in value)
  if hint is Any:
    return True
  if arguments:  # a mapping
    return isinstance(value, Mapping) and all(
      _has_type(key, arguments[0]) and _has_type(each, arguments[1])
      for key, each in value.items()
    )
  if isinstance(value, bool):
    return hint is bool
  if hint is float:  # NaN is not; an int has no largest
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max
  return isinstance(value, hint)

"""Model families, and loading of models from folders."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.paths import flatten, map_with_path
from lorax_flax.errors import LoraxError, check_known, listing, unknown
from lorax_flax.files import strict_json
from lorax_flax.hub.checkpoints import load as hub_load
from lorax_flax.hub.checkpoints import quantized
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.hub.files import gguf, gguf_header, safetensors
from lorax_flax.hub.peft import config as peft_config
from lorax_flax.hub.peft import folder as peft
from lorax_flax.methods import Adapter
from lorax_flax.models import (
  bert,
  cache,
  deberta,
  distilbert,
  gpt2,
  llama,
  t5,
  vit,
)
from lorax_flax.models.family import Family
from lorax_flax.models.remat import REMAT
from lorax_flax.models.soft import SoftSettings, places

FAMILIES: dict[str, Family] = {
  **bert.FAMILIES,
  **deberta.FAMILIES,
  **distilbert.FAMILIES,
  **gpt2.FAMILIES,
  **llama.FAMILIES,
  **t5.FAMILIES,
  **vit.FAMILIES,
}
# Endings of transformers' classes whose heads a task has trained.
_HEADS = (
  "ForSequenceClassification",
  "ForTokenClassification",
  "ForQuestionAnswering",
  "ForMultipleChoice",
  "ForNextSentencePrediction",
  "ForImageClassification",
  "DoubleHeadsModel",
)
_FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Outline:
  """A model without its weights.

  Attributes:
    family: of the model.
    module: called as module.apply({"params": params}, **inputs).
    config: the family's config.
    hf_config: the content of config.json.
    keymap: names in a checkpoint, ours and PEFT's.
  """

  family: Family
  module: nn.Module
  config: Any
  hf_config: Mapping[str, Any]
  keymap: KeyMap

  @property
  def max_length(self) -> int:
    """Maximal number of tokens of a text; 0 where the input is none."""
    return max(0, self.family.max_length(self.config) - self.virtual)

  @property
  def virtual(self) -> int:
    """Number of places before a text's own."""
    return places(getattr(self.config, "soft", None))

  @property
  def soft(self) -> dict[str, Any] | None:
    """The fields of its `SoftSettings`; None without trained states beside it."""
    settings = getattr(self.config, "soft", None)
    return None if settings is None else dataclasses.asdict(settings)

  @property
  def soft_paths(self) -> tuple[str, ...]:
    """Leaves that no checkpoint has, of trained states beside the weights."""
    if getattr(self.config, "soft", None) is None:
      return ()
    return tuple(p for p in flatten(_shapes(self)) if p not in self.keymap.keys)

  @property
  def token_types(self) -> bool:
    """True where the model distinguishes token types."""
    return getattr(self.config, "type_vocab_size", 0) > 1

  def blank_cache(self, batch: int, length: int, source_length: int = 0) -> cache.Cache:
    """A cache without tokens, in the module's dtype; arguments as of `cache.blank`."""
    if self.family.cache is None:
      raise LoraxError(f"a {self.hf_config['model_type']} doesn't generate")
    module: Any = self.module
    return cache.blank(
      self.family.cache(self.config),
      batch,
      length,
      source_length,
      dtype=module.dtype,
      stacked=module.scan,
      virtual=self.virtual,
    )

  def from_peft(self, source: str | Path | Mapping[str, Any]) -> LoraConfig:
    """A config in PEFT's names as one in ours; see `LoraConfig.from_peft`."""
    return peft.from_peft(source, self.keymap)

  def to_peft(self, config: LoraConfig, adapter: Adapter) -> dict[str, Any]:
    """An adapter's config in PEFT's names; see `LoraConfig.to_peft`."""
    task_type = peft_config.TASK_TYPES[self.family.task]
    return peft.to_peft(config, adapter, self.keymap, task_type=task_type)


@dataclass(frozen=True)
class Located(Outline):
  """A model without its weights, and where it is.

  Attributes:
    folder: that it is read from, with its tokenizer.
  """

  folder: Path


@dataclass(frozen=True)
class Loaded(Located):
  """A model and its weights.

  Attributes:
    params: the tree of weights.
    new_paths: leaves that the checkpoint did not have, freshly initialised.
    ignored_keys: stored keys that are not weights of this model.
  """

  params: Any
  new_paths: tuple[str, ...]
  ignored_keys: tuple[str, ...]

  @property
  def soft_paths(self) -> tuple[str, ...]:
    return tuple(path for path in self.new_paths if path not in self.keymap.keys)

  def reseeded(self, seed: int) -> "Loaded":
    """A copy with its new leaves drawn again, as `load` draws them with this seed."""
    stds = {path: _std(self, path) for path in self.new_paths}
    params = hub_load.redrawn(self.params, stds, seed=seed)
    return dataclasses.replace(self, params=params)


def load(
  folder: str | Path,
  *,
  num_labels: int | None = None,
  dtype: str = "float32",
  param_dtype: str | None = None,
  scan: bool = False,
  remat: str = "none",
  seed: int = 0,
  new_head: bool = False,
  shardings: Callable[[Any, Any], Any] | None = None,
  untie: bool = False,
  vocab_size: int | None = None,
  quant: str | None = None,
  soft: SoftSettings | None = None,
  deferred: bool = False,
) -> Loaded:
  """Loads a model from a Hugging Face folder, or from a GGUF file.

  Args:
    folder: with config.json and safetensors, or with a GGUF file; or that file.
    num_labels: outputs of a classifier's head, 1 for a regression; None takes
      config.json's.
    dtype: of computation: "float32", "bfloat16" or "float16".
    param_dtype: of the weights in memory; None keeps the stored dtype of each.
    scan, remat: see `stacking.stack`.
    seed: for a head that the checkpoint does not have.
    new_head: replace a head of another width than `num_labels`; otherwise an error.
    shardings: (tree of logical axis names, tree of shapes) -> tree of shardings. Each
      process then reads only the shards of its devices.
    untie: give each use of a tied table a weight of its own, a copy. PEFT adapters
      that change the uses apart need that.
    vocab_size: number of tokens, where it is not the checkpoint's. New rows are the
      mean of the others, as transformers starts them but for its noise of 1e-5.
    quant: one of `lorax_flax.quant.CHOICES` for the kernels of the layers, which are
      quantised as they are read, or kept in the blocks of a GGUF file. `lx.adapt` runs
      such a model.
    soft: trained states beside the weights: new leaves, to be named in
      `LoraConfig.tuned` as a new head is (`Outline.soft_paths`).
    deferred: leave the weights on disk; each leaf is read when it is used and not kept
      (see `quant.Deferred`).

  Raises:
    LoraxError: an unknown family, an unsupported config, or keys that do not match.
  """
  folder = Path(folder)
  hf_config = read_config(folder)
  outline_of = functools.partial(
    outline, num_labels=num_labels, dtype=dtype, scan=scan, remat=remat
  )
  ties = outline_of(hf_config).keymap.ties if untie else {}
  model = stored = outline_of(hf_config, untie=untie)
  if vocab_size is not None:
    model = outline_of(hf_config, untie=untie, vocab_size=vocab_size)
  # The keys first: a config that claims a thousand layers takes long to trace.
  found = hub_load.find(_open(folder), model.keymap, ties)
  stored_as = functools.partial(hub_load.stored_as, found)
  formats = quantized.formats(found.keymap, quant, stored_as)
  shapes = quantized.shapes(_shapes(stored), formats)
  axes = model.family.logical_axes
  weights = hub_load.load(
    found,
    shapes,
    dtype=param_dtype and _float("param_dtype", param_dtype),
    std=_std_of_head(model.config),
    seed=seed,
    new_head=new_head,
    shardings=shardings and shardings(axes(stored.module), shapes),
    deferred=deferred,
  )
  params = weights.params
  if model is not stored:
    shapes = quantized.shapes(_shapes(model), formats)
    resharded = shardings and shardings(axes(model.module), shapes)
    params = hub_load.resized(params, shapes, resharded)
  new_paths = weights.new_paths
  if soft is not None and soft.method is not None:
    model = outline_of(hf_config, untie=untie, vocab_size=vocab_size, soft=soft)
    shapes = quantized.shapes(_shapes(model), formats)
    resharded = shardings and shardings(axes(model.module), shapes)
    stds = {path: _std(model, path) for path in model.soft_paths}
    params = hub_load.extended(params, shapes, stds, seed=seed, shardings=resharded)
    new_paths = (*new_paths, *stds)
  return Loaded(
    **vars(model),
    params=params,
    new_paths=new_paths,
    ignored_keys=weights.ignored_keys,
    folder=folder,
  )


def stored(folder: Path) -> hub_load.Found:
  """The checkpoint of a folder, by its headers; its layers are not stacked."""
  return hub_load.find(_open(folder), outline(read_config(folder)).keymap)


def outline(
  hf_config: Mapping[str, Any],
  *,
  num_labels: int | None = None,
  dtype: str = "float32",
  scan: bool = False,
  remat: str = "none",
  untie: bool = False,
  vocab_size: int | None = None,
  soft: SoftSettings | None = None,
) -> Outline:
  """The model of a config.json, without a checkpoint; arguments as of `load`."""
  family = of(hf_config)
  if untie:
    if not family.keymap(family.configure(hf_config), scan).ties:
      raise LoraxError(
        f"untie: a {hf_config['model_type']} of this config has no tied tables"
      )
    hf_config = {**hf_config, **family.untied}
  if vocab_size is not None:
    if not hasattr(family.configure(hf_config), "vocab_size"):
      raise LoraxError(f"a {hf_config['model_type']} has no vocab_size")
    hf_config = {**hf_config, "vocab_size": vocab_size}
  check_known("remat", remat, REMAT)
  overrides = {} if num_labels is None else {"num_labels": num_labels}
  if overrides and not family.has_labels:
    raise LoraxError(
      f"a {hf_config['model_type']} is a {family.task} model: it has no num_labels"
    )
  config = family.configure(hf_config, **overrides)
  if soft is not None and soft.method is not None:
    _check_soft(family, soft, hf_config["model_type"])
    config = dataclasses.replace(config, soft=soft)
  module = family.build(config, _float("dtype", dtype), scan, remat)
  return Outline(family, module, config, hf_config, family.keymap(config, scan))


def abstract_params(
  model: Outline, param_dtype: str | None = None, quant: str | None = None
) -> Any:
  """The tree of a checkpoint's weights, of ShapeDtypeStructs.

  Args:
    param_dtype: as of `load`; None takes the dtype in config.json.
    quant: as of `load`.
  """
  stored = model.hf_config.get("dtype") or model.hf_config.get("torch_dtype")
  dtype = _float("dtype", param_dtype or stored or "float32")
  known = model.keymap.keys

  def struct(path, leaf):
    return jax.ShapeDtypeStruct(leaf.shape, dtype if path in known else jnp.float32)

  tree = map_with_path(struct, _shapes(model))
  return quantized.shapes(tree, quantized.formats(model.keymap, quant))


def _check_soft(family: Family, soft: SoftSettings, model_type: str) -> None:
  if soft.method not in family.soft:
    others = [name for name, each in FAMILIES.items() if soft.method in each.soft]
    raise LoraxError(
      f"soft.method={soft.method} is not built for a {model_type}, which has "
      f"{listing(family.soft) or 'none'}: it is for {listing(others)}"
    )


def _shapes(model: Outline) -> Any:
  """The parameters' tree, of ShapeDtypeStructs."""
  family, keymap = model.family, model.keymap
  if keymap.scan:
    return family.shapes(model.module)
  # With stacked layers only one is traced: tracing takes longer than reading.
  module: Any = model.module
  scanned = family.build(model.config, module.dtype, True, "none")
  stacked = family.keymap(model.config, True)
  has_soft = getattr(model.config, "soft", None) is not None
  return hub_load.unstacked(family.shapes(scanned), stacked, keymap, beside=has_soft)


def of(hf_config: Mapping[str, Any]) -> Family:
  """The family of a config.json, by its model_type.

  Raises:
    LoraxError: an unknown one; or by its architectures a model whose head, trained for
      another task, is not built here and would be lost.
  """
  name = hf_config.get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    raise LoraxError(unknown("model family", str(name), FAMILIES))
  family = FAMILIES[name]
  for architecture in hf_config.get("architectures") or ():
    if architecture != family.architecture and str(architecture).endswith(_HEADS):
      raise LoraxError(
        f"config: a {architecture} is not built here, of a {name} only "
        f"{family.architecture} is: the head that it was trained with would be lost. "
        "To go on without it, save its body alone: transformers.AutoModel"
        ".from_pretrained(FOLDER).save_pretrained(OTHER)"
      )
  return family


def _std(model: Outline, path: str) -> float:
  """Standard deviation of a new leaf, of a head or a soft part."""
  is_head = path in model.keymap.keys
  return _std_of_head(model.config) if is_head else model.config.soft.std_of(path)


def _std_of_head(config: Any) -> float:
  """Standard deviation of a new head's kernels."""
  return getattr(config, "initializer_range", 0.02)


def _float(option: str, name: str) -> jnp.dtype:
  if name not in _FLOATS:
    raise LoraxError(unknown(option, str(name), _FLOATS))
  return jnp.dtype(name)


def _open(folder: Path) -> safetensors.Reader:
  file = gguf_header.find(folder)
  return safetensors.open_folder(folder) if file is None else gguf.open_file(file)


def read_config(folder: Path) -> Mapping[str, Any]:
  """The object in a folder's config.json, or its equivalent of a GGUF file."""
  if (file := gguf_header.find(folder)) is not None:
    return gguf.read_config(file)
  return strict_json.read_object(folder / "config.json")

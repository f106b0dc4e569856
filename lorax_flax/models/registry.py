"""From a folder to a model: the families there are, and how one is loaded."""

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
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.files import strict_json
from lorax_flax.hub.checkpoints import load as hub_load
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.hub.files import gguf, gguf_header, safetensors
from lorax_flax.hub.peft import config as peft_config
from lorax_flax.hub.peft import folder as peft
from lorax_flax.methods import Adapter
from lorax_flax.models import distilbert, gpt2, layers, vit
from lorax_flax.models.bert import model as bert
from lorax_flax.models.deberta import model as deberta
from lorax_flax.models.family import Family
from lorax_flax.models.llama import variants
from lorax_flax.models.t5 import model as t5

FAMILIES: dict[str, Family] = {
  **bert.FAMILIES,
  **deberta.FAMILIES,
  **distilbert.FAMILIES,
  **gpt2.FAMILIES,
  **variants.FAMILIES,
  **t5.FAMILIES,
  **vit.FAMILIES,
}
_FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Outline:
  """A model without its weights.

  Attributes:
    family: what it is one of.
    module: call it as module.apply({"params": params}, **inputs).
    config: the model's shape.
    hf_config: config.json as it was read.
    keymap: names in a checkpoint, ours and PEFT's.
  """

  family: Family
  module: nn.Module
  config: Any
  hf_config: Mapping[str, Any]
  keymap: KeyMap

  @property
  def max_length(self) -> int:
    """How many tokens the model takes; 0 where it takes no text."""
    return self.family.max_length(self.config)

  @property
  def token_types(self) -> bool:
    """Whether token types tell the model anything."""
    return getattr(self.config, "type_vocab_size", 0) > 1

  def from_peft(self, source: str | Path | Mapping[str, Any]) -> LoraConfig:
    """A config in PEFT's names as one in ours; see `LoraConfig.from_peft`."""
    return peft.from_peft(source, self.keymap)

  def to_peft(self, config: LoraConfig, adapter: Adapter) -> dict[str, Any]:
    """An adapter's config in PEFT's names; see `LoraConfig.to_peft`."""
    task_type = peft_config.TASK_TYPES[self.family.task]
    return peft.to_peft(config, adapter, self.keymap, task_type=task_type)


@dataclass(frozen=True)
class Loaded(Outline):
  """A model and its weights.

  Attributes:
    params: the tree of weights.
    new_paths: leaves that the checkpoint did not have, freshly initialised.
    passed_over: stored keys that hold no weight of this model.
    folder: where it came from; its tokenizer lies there.
  """

  params: Any
  new_paths: tuple[str, ...]
  passed_over: tuple[str, ...]
  folder: Path

  def reseeded(self, seed: int) -> "Loaded":
    """The same with what the checkpoint lacks drawn as `load` draws it by this seed."""
    params = hub_load.redrawn(
      self.params, self.new_paths, std=_std(self.config), seed=seed
    )
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
) -> Loaded:
  """Loads a model from a Hugging Face folder, or from a GGUF file.

  Args:
    folder: with config.json and safetensors, or with a GGUF file; or that file.
    num_labels: outputs of a classifier's head, 1 for a regression; None takes
      config.json's.
    dtype: of computing: "float32", "bfloat16" or "float16".
    param_dtype: of the weights in memory; None leaves each as it is stored.
    scan, remat: see `layers.stack`.
    seed: of a head that the checkpoint does not have.
    new_head: a head of another width than asked for is replaced, not an error.
    shardings: (tree of logical axis names, tree of shapes) -> tree of shardings. Each
      process then reads its own parts of the weights, and no more.
    untie: a head that is the table of the tokens becomes a weight of its own, a copy.
      Adapters of PEFT that change one of the two need that.

  Raises:
    LoraxError: an unknown family, a config or a key that does not fit.
  """
  folder = Path(folder)
  hf_config = read_config(folder)
  described = functools.partial(
    outline, num_labels=num_labels, dtype=dtype, scan=scan, remat=remat
  )
  model = described(hf_config)
  ties: Mapping[str, str] = {}
  if untie:
    _check_tied(model)
    ties = model.keymap.ties
    model = described({**hf_config, "tie_word_embeddings": False})
  # The keys first: a config that claims a thousand layers takes long to trace.
  found = hub_load.find(_open(folder), model.keymap, ties)
  shapes = _shapes(model)
  lies = shardings and shardings(model.family.logical_axes(model.module), shapes)
  weights = hub_load.load(
    found,
    shapes,
    dtype=param_dtype and _float("param_dtype", param_dtype),
    std=_std(model.config),
    seed=seed,
    new_head=new_head,
    shardings=lies,
  )
  return Loaded(
    **vars(model),
    params=weights.params,
    new_paths=weights.new_paths,
    passed_over=weights.passed_over,
    folder=folder,
  )


def outline(
  hf_config: Mapping[str, Any],
  *,
  num_labels: int | None = None,
  dtype: str = "float32",
  scan: bool = False,
  remat: str = "none",
) -> Outline:
  """What a config.json says, without a checkpoint; arguments as `load` has them."""
  family = of(hf_config)
  layers.check_remat(remat)
  asked = {} if num_labels is None else {"num_labels": num_labels}
  if asked and not family.has_labels:
    raise LoraxError(
      f"a {hf_config['model_type']} is a {family.task} model: it has no num_labels"
    )
  config = family.configure(hf_config, **asked)
  module = family.build(config, _float("dtype", dtype), scan, remat)
  return Outline(family, module, config, hf_config, family.keymap(config, scan))


def abstract_params(model: Outline, param_dtype: str | None = None) -> Any:
  """The tree of weights that a checkpoint would give, of ShapeDtypeStructs.

  Args:
    param_dtype: as in `load`; None takes what config.json says the checkpoint has.
  """
  stored = model.hf_config.get("dtype") or model.hf_config.get("torch_dtype")
  dtype = _float("dtype", param_dtype or stored or "float32")
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _shapes(model)
  )


def _shapes(model: Outline) -> Any:
  """The parameters' tree, of ShapeDtypeStructs."""
  family, keymap = model.family, model.keymap
  if keymap.scan:
    return family.shapes(model.module)
  # Of all layers, one is traced: tracing takes longer than reading.
  module: Any = model.module
  scanned = family.build(model.config, module.dtype, True, "none")
  stacked = family.keymap(model.config, True)
  return hub_load.unstacked(family.shapes(scanned), stacked, keymap)


def _check_tied(model: Outline) -> None:
  if getattr(model.config, "tie_word_embeddings", None) is not True:
    raise LoraxError(
      f"untie: a {model.hf_config['model_type']} of this config has no head that could"
      " get a weight of its own"
    )


def of(hf_config: Mapping[str, Any]) -> Family:
  """The family of a config.json, by its model_type. Unknown: LoraxError."""
  name = hf_config.get("model_type")
  if not isinstance(name, str) or name not in FAMILIES:
    raise LoraxError(unknown("model family", str(name), FAMILIES))
  return FAMILIES[name]


def _std(config: Any) -> float:
  """Of the normal that new kernels are drawn from."""
  return getattr(config, "initializer_range", 0.02)


def _float(option: str, name: str) -> jnp.dtype:
  if name not in _FLOATS:
    raise LoraxError(unknown(option, str(name), _FLOATS))
  return jnp.dtype(name)


def _open(folder: Path) -> safetensors.Reader:
  file = gguf_header.find(folder)
  return safetensors.open_folder(folder) if file is None else gguf.open_file(file)


def read_config(folder: Path) -> Mapping[str, Any]:
  """The config.json of a folder, an object; or what a GGUF file says in its place."""
  if (file := gguf_header.find(folder)) is not None:
    return gguf.read_config(file)
  return strict_json.read_object(folder / "config.json")

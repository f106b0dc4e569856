"""From a folder to a model: the families there are, and how one is loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from lorax_flax.errors import LoraxError, unknown
from lorax_flax.hub import bert_keys, safetensors
from lorax_flax.hub import load as hub_load
from lorax_flax.hub.keymap import KeyMap
from lorax_flax.models import bert
from lorax_flax.models import config as model_config

# What transformers takes where a family's config.json is silent.
FAMILIES: dict[str, Mapping[str, Any]] = {
  "bert": {"vocab_size": 30522, "pad_token_id": 0, "type_vocab_size": 2},
  "roberta": {"vocab_size": 50265, "pad_token_id": 1, "type_vocab_size": 2},
  "xlm-roberta": {"vocab_size": 30522, "pad_token_id": 1, "type_vocab_size": 2},
}
_BASE = {
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "intermediate_size": 3072,
}
_FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
  """A model and its weights.

  Attributes:
    module: call it as module.apply({"params": params}, input_ids, attention_mask,
      token_type_ids).
    params: the tree of weights.
    config: the model's shape.
    hf_config: config.json as it was read.
    keymap: names in a checkpoint, ours and PEFT's.
    new_paths: leaves that the checkpoint did not have, freshly initialised.
    passed_over: stored keys that hold no weight of this model.
    folder: where it came from; its tokenizer lies there.
  """

  module: bert.SequenceClassifier
  params: Any
  config: model_config.EncoderConfig
  hf_config: Mapping[str, Any]
  keymap: KeyMap
  new_paths: tuple[str, ...]
  passed_over: tuple[str, ...]
  folder: Path

  @property
  def family(self) -> str:
    return self.config.model_type

  @property
  def max_length(self) -> int:
    """How many tokens the model takes."""
    return bert.max_length(self.config)

  @property
  def token_types(self) -> bool:
    """Whether token types tell the model anything."""
    return self.config.type_vocab_size > 1


def load(
  folder: str | Path,
  *,
  num_labels: int | None = None,
  dtype: str = "float32",
  param_dtype: str = "float32",
  scan: bool = False,
  remat: str = "none",
  seed: int = 0,
  new_head: bool = False,
) -> Loaded:
  """Loads a sequence classifier from a Hugging Face folder.

  Args:
    folder: with config.json and safetensors.
    num_labels: outputs of the head, 1 for a regression; None takes config.json's.
    dtype: of computing: "float32", "bfloat16" or "float16".
    param_dtype: of the weights in memory.
    scan, remat: see `bert.SequenceClassifier`.
    seed: of a head that the checkpoint does not have.
    new_head: a head of another width than asked for is replaced, not an error.

  Raises:
    LoraxError: an unknown family, a config or a key that does not fit.
  """
  folder = Path(folder)
  hf_config = read_config(folder)
  family = hf_config.get("model_type")
  if not isinstance(family, str) or family not in FAMILIES:
    raise LoraxError(unknown("model family", str(family), FAMILIES))
  if remat != "none" and remat not in bert.REMAT_POLICIES:
    raise LoraxError(unknown("remat", remat, ["none", *bert.REMAT_POLICIES]))
  asked = {} if num_labels is None else {"num_labels": num_labels}
  config = model_config.from_hf(hf_config, {**_BASE, **FAMILIES[family]}, **asked)
  module = bert.SequenceClassifier(config, _float("dtype", dtype), scan, remat)
  keymap = bert_keys.keymap(family, config.num_hidden_layers, scan)
  shapes = jax.tree.map(
    lambda box: box.value,
    bert.abstract_params(module),
    is_leaf=lambda x: isinstance(x, meta.AxisMetadata),
  )
  weights = hub_load.load(
    safetensors.open_folder(folder),
    keymap,
    shapes,
    dtype=_float("param_dtype", param_dtype),
    std=config.initializer_range,
    seed=seed,
    new_head=new_head,
  )
  return Loaded(
    module,
    weights.params,
    config,
    hf_config,
    keymap,
    weights.new_paths,
    weights.passed_over,
    folder,
  )


def _float(option: str, name: str) -> jnp.dtype:
  if name not in _FLOATS:
    raise LoraxError(unknown(option, str(name), _FLOATS))
  return jnp.dtype(name)


def read_config(folder: Path) -> Mapping[str, Any]:
  """The config.json of a folder, an object."""
  try:
    value = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise LoraxError(f"cannot read {folder / 'config.json'}: {error}") from error
  if not isinstance(value, dict):
    raise LoraxError(f"{folder / 'config.json'} holds no JSON object")
  return value

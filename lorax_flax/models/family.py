"""A model family, as the registry knows it."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.models.cache import Layout

Task = Literal[
  "sequence-classification", "causal-lm", "seq2seq-lm", "image-classification"
]


@dataclass(frozen=True)
class Family:
  """Functions that turn a checkpoint of one `model_type` into a model.

  A config is the family's own frozen dataclass, under Hugging Face's field names, and
  validates itself. Every module is called with its inputs by name and `deterministic`.

  Attributes:
    task: decides the outputs: (batch, labels), or (batch, tokens, vocabulary).
    architecture: transformers' class of a written checkpoint.
    configure: (config.json, overrides of its fields) -> config.
    build: (config, dtype of computation, scan, remat) -> module.
    keymap: (config, scan) -> names in a checkpoint, ours and PEFT's.
    inputs: (config) -> ShapeDtypeStructs of the smallest inputs, by name.
    max_length: (config) -> maximal number of tokens of a text; 0 if the input is none.
    cache: (config) -> the size of its cache; None for models that don't generate.
    soft: the methods of `models.soft.PARTS` that its modules have.
    untied: fields of config.json that give tied tables weights of their own.
    dropout: fields of the config that are dropout rates inside the model.
    head_dropout: those before the classifier.
    shards_tokens: (config) -> whether each device can compute its own tokens of a row
      (mesh.sequence); what attends to others is `ops.attention` alone.
  """

  task: Task
  architecture: str
  configure: Callable[..., Any]
  build: Callable[[Any, Any, bool, str], nn.Module]
  keymap: Callable[[Any, bool], KeyMap]
  inputs: Callable[[Any], Mapping[str, jax.ShapeDtypeStruct]]
  max_length: Callable[[Any], int]
  cache: Callable[[Any], Layout] | None = None
  soft: Collection[str] = ()
  untied: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: {"tie_word_embeddings": False}
  )
  dropout: tuple[str, ...] = ()
  head_dropout: tuple[str, ...] = ()
  shards_tokens: Callable[[Any], bool] = lambda config: False

  @property
  def has_labels(self) -> bool:
    """True where the outputs are classes, or a regression, of the full input."""
    return self.task.endswith("-classification")

  def abstract_params(self, module: nn.Module) -> Any:
    """Shapes of the parameters, boxed with their logical axis names; traced only."""
    return _abstract_params(self.inputs, module)

  def shapes(self, module: nn.Module) -> Any:
    """The parameters' tree, of ShapeDtypeStructs."""
    return jax.tree.map(
      lambda box: box.value,
      self.abstract_params(module),
      is_leaf=lambda x: isinstance(x, meta.AxisMetadata),
    )

  def logical_axes(self, module: nn.Module) -> Any:
    """The parameters' tree with the logical names of each leaf's axes."""
    return nn.get_partition_spec(self.abstract_params(module))


@functools.lru_cache(maxsize=4)  # A start asks several times, and a trace takes long.
def _abstract_params(inputs_of: Callable[..., Any], module: nn.Module) -> Any:
  inputs = inputs_of(module.config)  # type: ignore[attr-defined]
  init = lambda key, inputs: module.init(key, **inputs)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(init, key, inputs)["params"]


def text_inputs(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """The smallest inputs of a text model with one stack of layers."""
  del config
  ids_BxT = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  return {"input_ids": ids_BxT, "attention_mask": ids_BxT}

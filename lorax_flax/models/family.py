"""What the registry knows of a model family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from lorax_flax.hub.checkpoints.keymap import KeyMap

Task = Literal[
  "sequence-classification", "causal-lm", "seq2seq-lm", "image-classification"
]


@dataclass(frozen=True)
class Family:
  """How a checkpoint of one `model_type` becomes a model. A family's file makes one.

  A config is the family's own frozen dataclass, under Hugging Face's field names, and
  validates itself. Every module is called with its inputs by name and `deterministic`.

  Attributes:
    task: what the outputs are: (batch, labels), or (batch, tokens, vocabulary).
    architecture: transformers' name of the model that a written checkpoint is.
    configure: (config.json, fields that the caller decides) -> config.
    build: (config, dtype of computing, scan, remat) -> module.
    keymap: (config, scan) -> names in a checkpoint, ours and PEFT's.
    inputs: (config) -> ShapeDtypeStructs of the smallest inputs, by name.
    max_length: (config) -> how many tokens a text may have; 0 where it takes no text.
    dropout: fields of the config that are rates of dropout inside the model.
    head_dropout: those that are rates before the classifier.
  """

  task: Task
  architecture: str
  configure: Callable[..., Any]
  build: Callable[[Any, Any, bool, str], nn.Module]
  keymap: Callable[[Any, bool], KeyMap]
  inputs: Callable[[Any], Mapping[str, jax.ShapeDtypeStruct]]
  max_length: Callable[[Any], int]
  dropout: tuple[str, ...] = ()
  head_dropout: tuple[str, ...] = ()

  @property
  def has_labels(self) -> bool:
    """Whether the outputs are classes, or a regression, of the whole input."""
    return self.task.endswith("-classification")

  def abstract_params(self, module: nn.Module) -> Any:
    """Shapes of the parameters, boxed with their logical axis names; no FLOPs."""
    inputs = self.inputs(module.config)  # type: ignore[attr-defined]
    init = lambda key, inputs: module.init(key, **inputs)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(init, key, inputs)["params"]

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


def text_inputs(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """The smallest inputs of a model of text that has one stack of layers."""
  del config
  ids_BxT = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  return {"input_ids": ids_BxT, "attention_mask": ids_BxT}

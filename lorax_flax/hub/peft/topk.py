"""Logits of which a folder has the largest alone: their indices and their softmax."""

from dataclasses import replace

import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.hub.peft.config import PeftConfig
from lorax_flax.hub.peft.forms import form_of, method_of
from lorax_flax.hub.peft.tensors import Tensors

_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"


def expanded(tensors: Tensors, config: PeftConfig) -> Tensors:
  """A folder's tensors with logits again, minus infinity where they are not stored.

  Raises:
    LoraxError: indices without their weights, or beyond the number of logits.
  """
  option = form_of(config.peft_type).topk_of
  if not option:
    return tensors
  size = {**method_of(config).options, **config.options}[option]
  packed = {
    key.removesuffix(_INDICES): key for key in tensors.shapes if key.endswith(_INDICES)
  }

  def get(key: str) -> np.ndarray:
    return _logits(tensors, key, size) if key in packed else tensors.get(key)

  shapes = dict(tensors.shapes)
  for key, indices in packed.items():
    if shapes.pop(key + _WEIGHTS, None) is None:
      raise LoraxError(f"{tensors.name} has {indices}, and no {key + _WEIGHTS}")
    shapes[key] = (*shapes.pop(indices)[:-1], size)
  dtypes = {**tensors.dtypes, **dict.fromkeys(packed, np.dtype(np.float32))}
  return replace(tensors, shapes=shapes, dtypes=dtypes, get=get)


def _logits(tensors: Tensors, key: str, size: int) -> np.ndarray:
  indices = tensors.get(key + _INDICES).astype(np.int64)
  weights = tensors.get(key + _WEIGHTS).astype(np.float32)
  if indices.min() < 0 or indices.max() >= size:
    raise LoraxError(f"{key + _INDICES} are from 0 to {size - 1}, and there are others")
  # The last weight is what the stored ones leave of 1.
  weights = np.concatenate([weights, 1 - weights.sum(-1, keepdims=True)], axis=-1)
  found = np.full((*indices.shape[:-1], size), -np.inf, np.float32)
  with np.errstate(divide="ignore"):
    np.put_along_axis(found, indices, np.log(np.maximum(weights, 0)), axis=-1)
  return found

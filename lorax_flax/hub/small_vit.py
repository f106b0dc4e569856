"""A small ViT with random weights, made here: where training on small images starts.

No registry carries a ViT. Source of the shapes: transformers' ViTModel.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lorax_flax.files import atomic
from lorax_flax.hub import assets

NAME = "small_vit"

_SIDE, _PATCH, _WIDTH, _LAYERS, _MLP = 8, 2, 64, 4, 128
_CONFIG = {
  "architectures": ["ViTModel"],
  "hidden_act": "gelu",
  "hidden_size": _WIDTH,
  "image_size": _SIDE,
  "initializer_range": 0.02,
  "intermediate_size": _MLP,
  "model_type": "vit",
  "num_attention_heads": 4,
  "num_channels": 3,
  "num_hidden_layers": _LAYERS,
  "patch_size": _PATCH,
}
_PROCESSOR = {
  "do_normalize": True,
  "do_rescale": True,
  "do_resize": True,
  "image_mean": [0.5, 0.5, 0.5],
  "image_processor_type": "ViTImageProcessor",
  "image_std": [0.5, 0.5, 0.5],
  "resample": 2,
  "rescale_factor": 1 / 255,
  "size": {"height": _SIDE, "width": _SIDE},
}
_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


def path() -> Path:
  """The model's folder in the cache, made where it is not there.

  Raises:
    LoraxError: a cache that can't be written.
  """
  final = assets.cache_dir() / "made" / f"{NAME}-1"
  complete = lambda folder: all((folder / name).is_file() for name in _FILES)
  if not complete(final):
    hint = f"; {assets.CACHE_VARIABLE}=FOLDER names another place"
    with atomic.cached_folder(final, complete, hint=hint) as folder:
      _write(folder)
  return final


def _write(folder: Path) -> None:
  for name, content in zip(_FILES, (_CONFIG, _PROCESSOR), strict=False):
    (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
  rng = np.random.default_rng(0)
  tensors = {}
  for name, shape in _shapes():
    if name.endswith("bias"):
      tensors[name] = np.zeros(shape, np.float32)
    elif "layernorm" in name:
      tensors[name] = np.ones(shape, np.float32)
    else:
      tensors[name] = rng.normal(0.0, 0.02, shape).astype(np.float32)
  save_file(tensors, folder / _FILES[-1], metadata={"format": "pt"})


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
  """Keys of the checkpoint, and their shapes."""
  positions = (_SIDE // _PATCH) ** 2 + 1
  yield "embeddings.cls_token", (1, 1, _WIDTH)
  yield "embeddings.position_embeddings", (1, positions, _WIDTH)
  linear: dict[str, tuple[int, ...]] = {
    "embeddings.patch_embeddings.projection": (_WIDTH, 3, _PATCH, _PATCH)
  }
  norms = ["layernorm"]
  for number in range(_LAYERS):
    layer = f"encoder.layer.{number}"
    for name in ("query", "key", "value"):
      linear[f"{layer}.attention.attention.{name}"] = (_WIDTH, _WIDTH)
    linear[f"{layer}.attention.output.dense"] = (_WIDTH, _WIDTH)
    linear[f"{layer}.intermediate.dense"] = (_MLP, _WIDTH)
    linear[f"{layer}.output.dense"] = (_WIDTH, _MLP)
    norms += [f"{layer}.layernorm_before", f"{layer}.layernorm_after"]
  for name, shape in (linear | dict.fromkeys(norms, (_WIDTH,))).items():
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]

"""Adapters of mlx-lm, which trains and serves decoders on Apple's chips.

A folder holds adapters.safetensors, "MODULE.lora_a" (in, rank) and "MODULE.lora_b"
(rank, out), and adapter_config.json with `fine_tune_type`, `lora_parameters` and
`num_layers`. The `scale` there is the factor of lora_a @ lora_b itself, not alpha, and
it and `rank` are of all modules. `keys` name the modules to adapt: within a layer, for
the last `num_layers` layers, or in the whole model. Modules are named as transformers'
are, those of the body under "model." in every family. A tied table's LoRA changes both
of its uses, as ours does. Source: mlx_lm/lora.py, tuner/utils.py and tuner/lora.py of
mlx-lm 0.32.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lorax_flax.errors import LoraxError, check_known
from lorax_flax.files import strict_json
from lorax_flax.hub.adapters.plain import Base, Plain, by_layer, only_rank, paired
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.hub.files.safetensors import open_file

TOOL = "mlx-lm"
HAS_ALPHA = True
FILE = "adapters.safetensors"
_CONFIG = "adapter_config.json"
_ENDS = {".lora_a": "A", ".lora_b": "B"}
_BODY = "model."
# Of our families, those whose modules it names as transformers does.
_FAMILIES = (
  *("gemma", "gemma2", "gemma3_text", "gpt2", "llama", "mistral", "mixtral", "phi3"),
  *("qwen2", "qwen3", "qwen3_moe", "smollm3"),
)


def is_adapter(source: Path) -> bool:
  """Checks for a folder, or a file of one, such as 0000100_adapters.safetensors."""
  file = _file_of(source)
  named = file.name == FILE or file.name.endswith(f"_{FILE}")
  return named and file.is_file() and (file.parent / _CONFIG).is_file()


def _file_of(source: Path) -> Path:
  return source / FILE if source.is_dir() else source


def read(source: Path, base: Base) -> tuple[Mapping[str, np.ndarray], float]:
  """Reads a folder, or a step's file in one.

  Raises:
    LoraxError: a damaged file, DoRA or full fine-tuning, or a factor of another rank
      than the folder's config.
  """
  check_known(f"{TOOL} model family", base.keymap.family, _FAMILIES)
  file = _file_of(source)
  rank, scale = _parameters(strict_json.read_object(file.parent / _CONFIG))
  tensors: dict[str, np.ndarray] = {}
  for module, pair in paired(dict(open_file(file)), _ENDS, TOOL).items():
    found = pair["A"].shape[1], len(pair["B"])
    if found != (rank, rank):
      raise LoraxError(f"{module} has the ranks {found}, and {_CONFIG} says {rank}")
    name = module
    if module.startswith(_BODY):
      name = base.keymap.prefix + module.removeprefix(_BODY)
    tensors |= {f"{name}.lora_{x}": factor.T for x, factor in pair.items()}
  return tensors, scale * rank


def _parameters(config: Mapping[str, Any]) -> tuple[int, float]:
  """The rank and scale in a folder's config."""
  kind = config.get("fine_tune_type", "lora")
  if kind != "lora":
    raise LoraxError(
      f"{_CONFIG}: fine_tune_type is {kind!r}, and 'lora' alone is read. Merge the"
      " adapter there (mlx_lm.fuse), and take the result as a base"
    )
  said = config.get("lora_parameters")
  match said:
    case {"rank": int(rank), "scale": int(scale) | float(scale)} if (
      min(rank, scale) > 0
    ):
      return rank, scale
  raise LoraxError(
    f"{_CONFIG}: lora_parameters needs a rank and a scale above 0, and has {said!r}"
  )


def write(folder: Path, plain: Plain, base: Base) -> None:
  """Writes a new folder, float32.

  Raises:
    LoraxError: a family that mlx-lm names otherwise, or modules of different ranks.
  """
  keymap, rank = base.keymap, only_rank(plain, TOOL)
  check_known(f"{TOOL} model family", keymap.family, _FAMILIES)
  tensors = {_renamed(key, keymap): value.T for key, value in plain.tensors.items()}
  keys, layers = _places({name.rpartition(".")[0]: None for name in tensors}, keymap)
  config = {
    "fine_tune_type": "lora",
    "lora_parameters": {
      "dropout": 0.0,
      "keys": keys,
      "rank": rank,
      "scale": plain.alpha / rank,
    },
    "num_layers": layers,
  }
  (folder / _CONFIG).write_text(f"{json.dumps(config, indent=4)}\n", encoding="utf-8")
  save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / FILE)


def _renamed(key: str, keymap: KeyMap) -> str:
  module, _, factor = key.rpartition(".")
  if module.startswith(keymap.prefix):
    module = _BODY + module.removeprefix(keymap.prefix)
  return f"{module}.{factor.lower()}"


def _places(modules: Mapping[str, None], keymap: KeyMap) -> tuple[list[str], int]:
  """`keys` and `num_layers` that name these modules and no others."""
  layers, outside = by_layer(modules)
  total = keymap.counts["i"]
  same = [names == layers[max(layers)] for names in layers.values()]
  if all(same) and [*sorted(layers)] == [*range(total - len(layers), total)]:
    return sorted({*outside, *layers.get(total - 1, ())}), len(layers)
  # Names of the whole model, which no layer has within it.
  return sorted(modules), total

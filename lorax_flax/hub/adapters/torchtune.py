"""Adapters of torchtune, PyTorch's own library for fine-tuning (until 2025).

adapter_model.pt is a state dict with "MODULE.lora_a.weight" (rank, in) and
"MODULE.lora_b.weight" (out, rank), under torchtune's names of modules. Its rotary
positions turn neighbouring features where transformers turn those half a head apart,
so the rows of queries and keys are permuted, except for Qwen2's. The scale is
alpha / rank. The recipe has one of each for all modules, and the same modules in all
layers; the file has none of this. torchtune adapts no token embeddings. Its
checkpointer of Hugging Face's models writes a PEFT folder around the file, which is
read as such.
Source: torchtune/models/convert_weights.py, models/qwen2/_convert_weights.py,
training/checkpointing/_checkpointer.py and modules/peft of torchtune 0.6.1.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lorax_flax.errors import LoraxError, check_known, listing, unknown
from lorax_flax.hub.adapters.plain import Base, Plain, by_layer, only_rank, paired
from lorax_flax.hub.files import torch_file
from lorax_flax.hub.files.gguf_architectures import TensorForm
from lorax_flax.hub.peft.config import CONFIG_FILE

TOOL = "torchtune"
HAS_ALPHA = False
FILE = "adapter_model.pt"
_ENDS = {".lora_a.weight": "A", ".lora_b.weight": "B"}
# Of our families, those that it has with the same modules, and whether it permutes.
_PERMUTED = {
  **dict.fromkeys(("gemma", "gemma2", "llama", "mistral"), True),
  "qwen2": False,
}
_MLP = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_INSIDE = {f"attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkv"}
_INSIDE |= {"attn.output_proj": "self_attn.o_proj"}
_INSIDE |= {f"mlp.{x}": f"mlp.{y}" for x, y in _MLP.items()}
# Its names of modules, {i} being the layer, to transformers'.
_MODULES = {
  "output": "lm_head",
  **{f"layers.{{i}}.{x}": f"model.layers.{{i}}.{y}" for x, y in _INSIDE.items()},
}
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def _file_of(source: Path) -> Path:
  return source / FILE if source.is_dir() else source


def is_adapter(source: Path) -> bool:
  """Checks for a file, or a folder's, by the names of its tensors."""
  file = _file_of(source)
  if not file.is_file() or not torch_file.is_torch_file(file):
    return False
  if (file.parent / CONFIG_FILE).is_file():  # a PEFT folder with the same adapter
    return False
  return any(name.endswith((*_ENDS,)) for name in torch_file.read(file))


def read(source: Path, base: Base) -> tuple[Mapping[str, np.ndarray], None]:
  """Reads a file, or the one of a folder.

  Raises:
    LoraxError: a damaged file, a tensor that is no factor, or an unknown module.
  """
  check_known(f"{TOOL} model family", base.keymap.family, _PERMUTED)
  tensors = {}
  for module, pair in paired(torch_file.read(_file_of(source)), _ENDS, TOOL).items():
    name, rows = _renamed(module, _MODULES), _rows(module, len(pair["B"]), base)
    tensors[f"{name}.lora_A"] = pair["A"]
    tensors[f"{name}.lora_B"] = pair["B"][np.argsort(rows)]
  return tensors, None


def write(folder: Path, plain: Plain, base: Base) -> None:
  """Writes a new folder, float32.

  Raises:
    LoraxError: a family or a module that torchtune does not adapt, modules of different
      ranks, or layers with different modules.
  """
  check_known(f"{TOOL} model family", base.keymap.family, _PERMUTED)
  only_rank(plain, TOOL)
  theirs = {ours: name for name, ours in _MODULES.items()}
  tensors = {}
  for key, value in plain.tensors.items():
    name, _, factor = key.rpartition(".")
    module = _renamed(name, theirs)
    if factor == "lora_B":
      value = value[_rows(module, len(value), base)]
    tensors[f"{module}.{factor.lower()}.weight"] = np.ascontiguousarray(value)
  _check_places({name.rsplit(".", 2)[0]: None for name in tensors}, base)
  torch_file.write(folder / FILE, tensors)


def _renamed(module: str, names: Mapping[str, str]) -> str:
  generic = re.sub(r"\.\d+\.", ".{i}.", module, count=1)
  if generic not in names:
    raise LoraxError(unknown(f"{TOOL} module", module, names))
  layer = re.search(r"\.(\d+)\.", module)
  return names[generic].format(i=layer and layer[1])


def _rows(module: str, count: int, base: Base) -> np.ndarray:
  """The row of transformers' for each of torchtune's rows of lora_b."""
  heads = base.heads.get(_HEADS.get(module.rpartition(".")[2], ""))
  return TensorForm(heads if _PERMUTED[base.keymap.family] else None).row_order(count)


def _check_places(modules: Mapping[str, None], base: Base) -> None:
  """Refuses modules that no recipe's settings name."""
  layers, _ = by_layer(modules)
  names = set().union(*layers.values())
  for i in range(base.keymap.counts["i"] if names else 0):
    if missing := names - layers.get(i, set()):
      raise LoraxError(
        f"{TOOL} adapts the same modules in all layers, and layer {i} lacks"
        f" {listing(missing)}"
      )
  mlp = {f"mlp.{name}" for name in _MLP}
  if names & mlp and not mlp <= names:
    raise LoraxError(
      f"{TOOL} adapts all of {listing(mlp)} or none, and here are"
      f" {listing(names & mlp)} alone"
    )

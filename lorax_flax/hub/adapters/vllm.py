"""PEFT folders that vLLM reads right.

vLLM loads PEFT's files with rules of its own (vllm/lora/peft_helper.py, lora_model.py
and config/lora.py): one lora_alpha / r for all modules, whatever rank_pattern and
alpha_pattern say; ranks up to its --max-lora-rank, one of a few; factors alone: no
DoRA, no modules_to_save, no biases. So every rank is padded with zeros to the largest,
each module's scale is folded into its B, and what is left over is refused here, by
name, rather than when a server starts.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from lorax_flax.adapt import stacking
from lorax_flax.errors import LoraxError, listing
from lorax_flax.files import atomic
from lorax_flax.hub.adapters.native import Saved
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.hub.peft import config as peft_config
from lorax_flax.hub.peft import config_file
from lorax_flax.hub.peft import folder as peft
from lorax_flax.hub.peft.config import PeftConfig
from lorax_flax.hub.peft.layout import PREFIX
from lorax_flax.methods import LoRA

# What --max-lora-rank may be; 16 where it is not given.
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
DEFAULT_MAX_RANK = 16
# The families whose model takes LoRA there; some on their embeddings too.
_WITH_EMBEDDINGS = ("llama", "mistral", "mixtral", "phi3")
_GEMMA = ("gemma", "gemma2", "gemma3_text")
_QWEN = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
_FAMILIES = (*_WITH_EMBEDDINGS, *_GEMMA, *_QWEN, "smollm3")
_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_EMBEDDINGS = ("embed_tokens", "lm_head")
_REPEATED = tuple(f".{name}.base_layer.weight" for name in _EMBEDDINGS)


def write_adapter(
  folder: str | Path,
  saved: Saved,
  keymap: KeyMap,
  *,
  max_rank: int = DEFAULT_MAX_RANK,
) -> None:
  """Writes a folder for vLLM, whole or not at all; peft reads it to the same deltas.

  Args:
    saved: the adapter.
    keymap: of the base.
    max_rank: the server's --max-lora-rank.

  Raises:
    LoraxError: what vLLM rejects, or a folder that can't be written.
  """
  _check(saved, keymap, max_rank)
  with atomic.new_folder(Path(folder).expanduser(), overwrite=True) as scratch:
    peft.write_adapter(
      scratch,
      saved.adapter,
      keymap,
      saved.config,
      base_name=saved.base_name,
      revision=saved.revision,
      task_type=saved.task_type,
    )
    config = config_file.read(scratch)
    config, tensors = fold(config, load_file(scratch / peft.WEIGHTS_FILE))
    text = json.dumps(config_file.dump(config), indent=2, sort_keys=True)
    (scratch / peft_config.CONFIG_FILE).write_text(text, encoding="utf-8")
    save_file(tensors, scratch / peft.WEIGHTS_FILE, metadata={"format": "pt"})


def fold(
  config: PeftConfig, tensors: Mapping[str, np.ndarray]
) -> tuple[PeftConfig, dict[str, np.ndarray]]:
  """Deltas of equal value with one rank and one alpha: the largest, and the scale most
  modules have, whose B stays as it is."""
  # PEFT repeats the base's embedding beside its factors; vLLM passes over it.
  tensors = {k: v for k, v in tensors.items() if not k.endswith(_REPEATED)}
  modules = {key: _module(key) for key in tensors}
  scales = {name: config.scale(name) for name in modules.values()}
  rank, scale = max(map(config.rank, scales)), stacking.most_common(scales)
  folded = {}
  for key, tensor in tensors.items():
    is_a = key.removesuffix(".weight").endswith("_A")
    if not is_a and scales[modules[key]] != scale:
      # In float32, so that the product rounds once.
      tensor = np.float32(scales[modules[key]] / scale) * tensor.astype(np.float32)
    pad = [(0, 0), (0, 0)]
    pad[0 if is_a else 1] = (0, rank - tensor.shape[0 if is_a else 1])
    folded[key] = np.pad(tensor, pad)
  alpha = scale * rank
  config = dataclasses.replace(
    config,
    r=rank,
    lora_alpha=int(alpha) if alpha.is_integer() else alpha,
    rank_pattern={},
    alpha_pattern={},
    use_rslora=False,
  )
  return config, folded


def _check(saved: Saved, keymap: KeyMap, max_rank: int) -> None:
  if max_rank not in MAX_RANKS:
    raise LoraxError(f"vLLM's --max-lora-rank is one of {MAX_RANKS}, not {max_rank}")
  if keymap.family not in _FAMILIES:
    raise LoraxError(
      f"vLLM takes no LoRA on a {keymap.family}; of our families it does on: "
      f"{listing(_FAMILIES)}"
    )
  ranks: list[int] = []
  for path, delta in saved.adapter.items():
    if not isinstance(delta, LoRA):
      raise LoraxError(
        f"vLLM rejects {type(delta).__name__}, which {path} has: it loads the two "
        "factors of LoRA alone (no DoRA, biases, or weights trained in full). Merge "
        "the adapter instead (experiments.merge)"
      )
    if delta.roles[-2:] != ("in", "out") or delta.roles.count("stack") > keymap.scan:
      raise LoraxError(f"vLLM has no form for the LoRA of {path}, roles {delta.roles}")
    name = path.split("/")[-2]
    if name in _EMBEDDINGS and keymap.family not in _WITH_EMBEDDINGS:
      raise LoraxError(f"vLLM takes no LoRA on the embeddings of a {keymap.family}")
    ranks.append(delta.rank)
  rank = max(ranks, default=0)
  if rank > max_rank:
    enough = next((n for n in MAX_RANKS if n >= rank), None)
    hint = f": start it with {enough} and give max_rank={enough}"
    raise LoraxError(
      f"rank {rank} is above vLLM's --max-lora-rank of {max_rank}"
      + (hint if enough else f", which is {MAX_RANKS[-1]} at most")
    )


def _module(key: str) -> str:
  for end in _ENDS:
    if key.endswith(end):
      return key.removeprefix(PREFIX).removesuffix(end)
  raise LoraxError(f"vLLM rejects the tensor {key}")

"""Adapters of Google DeepMind's gemma library (gm.nn.LoRA).

An orbax checkpoint of its params has "layer_0/attn/q_einsum/_LoRAEinsum_0/lora/a" and
"…/b" beside the kernels, or alone, as peft.split_params leaves them. All linear layers
have a LoRA of one rank, which is added as it is: the scale is 1. Keys and values have
one A, and so have the two halves of the MLP's first kernel. Source: gemma 3.3.0's
gm/nn/_lora.py and peft. The library itself was seen to load what is written here
(gm.ckpts.load_params), to the same logits.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from lorax_flax.errors import LoraxError, check_known, listing
from lorax_flax.hub.adapters import trees
from lorax_flax.hub.adapters.plain import Base, Plain, only_rank
from lorax_flax.hub.adapters.trees import Kernel

TOOL = "gemma"
HAS_ALPHA = True
FILE = "params"
_A, _B = "/lora/a", "/lora/b"
_FAMILIES = ("gemma2", "gemma3_text")
_Q, _KV = "num_attention_heads", "num_key_value_heads"
_QKV = tuple(f"self_attn.{x}_proj" for x in "qkv")
_EINSUM = "attn/{}_einsum/_LoRAEinsum_0"
_BESIDE = {
  _EINSUM.format("attn_vec"): Kernel(("self_attn.o_proj",), heads_in=_Q),
  "mlp/_LoRAEinsum_gating_einsum": Kernel(("mlp.gate_proj", "mlp.up_proj")),
  "mlp/_LoRAEinsum_linear": Kernel(("mlp.down_proj",)),
}
# With as many heads of keys as of queries, and with fewer.
_FUSED = {_EINSUM.format("qkv"): Kernel(_QKV, heads_out=_Q)}
_GROUPED = {
  _EINSUM.format("q"): Kernel(_QKV[:1], heads_out=_Q),
  _EINSUM.format("kv"): Kernel(_QKV[1:], heads_out=_KV),
}


def _checkpoint(source: Path) -> Path:
  """The checkpoint itself, or that in a folder which was written here."""
  return source / FILE if (source / FILE).is_dir() else source


def is_adapter(source: Path) -> bool:
  """Checks for a checkpoint, or a folder's, by the names of its leaves."""
  return any(name.endswith((_A, _B)) for name in trees.leaves(_checkpoint(source)))


def read(source: Path, base: Base) -> tuple[Mapping[str, np.ndarray], float]:
  """Reads the factors of a checkpoint, whether or not it has the base's weights too.

  Raises:
    LoraxError: a damaged checkpoint, an unknown kernel, or several ranks.
  """
  tensors = trees.read(_checkpoint(source), _form(base))
  return tensors, float(only_rank(Plain(tensors, 1.0), TOOL))


def write(folder: Path, plain: Plain, base: Base) -> None:
  """Writes a new folder, float32.

  Raises:
    LoraxError: another family, a module that gemma does not adapt, or a linear layer
      without a LoRA, which every one has there.
  """
  form = _form(base)
  leaves = trees.of_plain(plain, form, base.heads, scale=1.0)
  if missing := {name for name in form.kernels if name + _A not in leaves}:
    names = (module for name in missing for module in form.kernels[name].modules)
    raise LoraxError(
      f"{TOOL} adapts all linear layers, and here is no LoRA of {listing(names, 6)}"
    )
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save((folder / FILE).absolute(), trees.nested(leaves))


def _form(base: Base) -> trees.Form:
  check_known(f"{TOOL} model family", base.keymap.family, _FAMILIES)
  attention = _FUSED if base.heads[_Q] == base.heads[_KV] else _GROUPED
  kernels = trees.in_layers("layer_{i}", attention | _BESIDE, base)
  return trees.Form(TOOL, _A, _B, kernels)

"""Adapters of Tunix, Google's library for fine-tuning, whose LoRA is qwix's.

Its trainer's folder has STEP/model_params/, an orbax checkpoint of the LoRA's leaves
alone: "layers/0/attn/q_proj/w_lora_a/value", with the axes of its models' kernels. The
scale is alpha / rank of the trainer's config, which is not stored. The config's pattern
of modules may name any of the layers' kernels and the head; token embeddings have no
LoRA. Source: tunix/sft/checkpoint_manager.py and tunix/models of Tunix 0.1.7, and
qwix/_src/providers/lora.py of qwix 0.1.8. Tunix itself was seen to load what is written
here, to the same logits.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from lorax_flax.errors import check_known
from lorax_flax.hub.adapters import trees
from lorax_flax.hub.adapters.plain import Base, Plain
from lorax_flax.hub.adapters.trees import Kernel

TOOL = "Tunix"
HAS_ALPHA = False
_ITEM = "model_params"
# The step that is written, after which its trainer starts from the first batch.
FILE = f"0/{_ITEM}"
_A, _B = "_lora_a/value", "_lora_b/value"
_Q, _KV = "num_attention_heads", "num_key_value_heads"
_MLP = {
  f"mlp/{x}_proj/kernel": Kernel((f"mlp.{x}_proj",)) for x in ("gate", "up", "down")
}
_SEPARATE = {
  "attn/q_proj/w": Kernel(("self_attn.q_proj",), heads_out=_Q),
  "attn/k_proj/w": Kernel(("self_attn.k_proj",), heads_out=_KV),
  "attn/v_proj/w": Kernel(("self_attn.v_proj",), heads_out=_KV),
  "attn/o_proj/w": Kernel(("self_attn.o_proj",), heads_in=_Q),
}
# Of our families, those whose kernels it has.
_FAMILIES = ("llama", "qwen2", "qwen3")


def _checkpoint(source: Path) -> Path:
  """The checkpoint in the folder of a step, or in that of a run's last step."""
  steps = source.glob(f"*/{_ITEM}")
  found = {int(x.parent.name): x for x in steps if x.parent.name.isdecimal()}
  return found[max(found)] if found else source / _ITEM


def is_adapter(source: Path) -> bool:
  """Checks for a run's folder, or a step's, by the names of its leaves."""
  return any(name.endswith((_A, _B)) for name in trees.leaves(_checkpoint(source)))


def read(source: Path, base: Base) -> tuple[Mapping[str, np.ndarray], None]:
  """Reads the last step of a run's folder, or a step's folder.

  Raises:
    LoraxError: a damaged checkpoint, or an unknown kernel.
  """
  return trees.read(_checkpoint(source), _form(base)), None


def write(folder: Path, plain: Plain, base: Base) -> None:
  """Writes a new folder, float32.

  Raises:
    LoraxError: a family or a module that Tunix does not adapt.
  """
  tree = trees.nested(trees.of_plain(plain, _form(base), base.heads))
  saved = ocp.args.Composite(**{_ITEM: ocp.args.PyTreeSave(tree)})
  handler = ocp.CompositeCheckpointHandler(**{_ITEM: ocp.PyTreeCheckpointHandler()})
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save((folder / FILE).parent.absolute(), saved)


def _form(base: Base) -> trees.Form:
  check_known(f"{TOOL} model family", base.keymap.family, _FAMILIES)
  kernels = trees.in_layers("layers/{i}", _SEPARATE | _MLP, base)
  return trees.Form(TOOL, _A, _B, kernels | {"lm_head/w": Kernel(("lm_head",))})

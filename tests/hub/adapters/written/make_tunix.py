"""Writes tunix/ by qwix's LoRA and Tunix's checkpoint manager, and its logits.

pip install google-tunix==0.1.7 qwix==0.1.8
python tests/hub/adapters/written/make_tunix.py
"""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import base
import jax.numpy as jnp
import qwix
from flax import nnx
from safetensors.numpy import save_file
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params
from tunix.sft.checkpoint_manager import CheckpointManager

OUT = Path(__file__).parent / "tunix"
RANK, ALPHA = 2, 3.0

# This version's attention never passes its config's base on.
theta = base.CONFIG["rope_theta"]
llama3.apply_rope = functools.partial(llama3.apply_rope, rope_theta=theta)


def model(folder):
  c = base.CONFIG
  config = llama3.ModelConfig(
    num_layers=c["num_hidden_layers"],
    vocab_size=c["vocab_size"],
    embed_dim=c["hidden_size"],
    hidden_dim=c["intermediate_size"],
    num_heads=c["num_attention_heads"],
    head_dim=c["head_dim"],
    num_kv_heads=c["num_key_value_heads"],
    rope_theta=theta,
    norm_eps=c["rms_norm_eps"],
  )
  save_file(base.weights(), folder / "model.safetensors")
  made = params.create_model_from_safe_tensors(str(folder), config)
  provider = qwix.LoraProvider(
    module_path=".*(q_proj|k_proj|v_proj|o_proj|gate_proj|down_proj)",
    rank=RANK,
    alpha=ALPHA,
  )
  inputs = made.get_model_input()
  return qwix.apply_lora_to_model(made, provider, rngs=nnx.Rngs(0), **inputs)


def logits(made):
  ids = jnp.asarray([base.IDS])
  mask = jnp.tril(jnp.ones((1, ids.size, ids.size), bool))
  found, _ = made(ids, jnp.arange(ids.size)[None], None, mask)
  return found[0, -1].tolist()


def restored(folder, scratch):
  """The base with the adapter of a folder, as Tunix's trainer loads it."""
  made = model(scratch)
  manager = CheckpointManager(str(folder.absolute()))
  manager.maybe_restore(made, restore_only_lora_params=True)
  return made


if __name__ == "__main__":
  scratch = Path(tempfile.mkdtemp())
  trained = model(scratch)
  state = nnx.to_flat_state(nnx.state(trained, nnx.LoRAParam))
  leaves = sorted(state, key=lambda item: str(item[0]))
  for i, (_, leaf) in enumerate(leaves):
    leaf[...] = jnp.asarray(base.value(i, *leaf[...].shape), jnp.float32)
  nnx.update(trained, nnx.from_flat_state(leaves))
  shutil.rmtree(OUT, ignore_errors=True)
  manager = CheckpointManager(str(OUT.absolute()))
  manager.save(7, trained, save_only_lora_params=True, force=True)
  manager.close()
  assert logits(restored(OUT, scratch)) == logits(trained)
  (OUT / "logits.json").write_text(json.dumps(logits(trained)) + "\n")

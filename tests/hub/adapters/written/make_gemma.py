r"""Writes gemma/ by the gemma library's LoRA and checkpoints, and its logits.

pip install gemma==3.3.0 kauldron==1.3.0 jax==0.8.0 flax==0.12.0 \
  orbax-checkpoint==0.11.26 typeguard==4.4.4 tensorflow-cpu
python tests/hub/adapters/written/make_gemma.py
"""

import json
import shutil
from pathlib import Path

import base
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from gemma import gm, peft
from gemma.gm.nn import _transformer
from gemma.gm.nn._config import TransformerConfig
from gemma.gm.nn._modules import AttentionType

OUT = Path(__file__).parent / "gemma"
RANK = 2
# Its names of kernels and norms, to transformers', and the shape and order of axes.
KERNELS = {
  "attn/attn_vec_einsum/w": (["self_attn.o_proj"], (2, 4, 8), None),
  "attn/q_einsum/w": (["self_attn.q_proj"], (8, 2, 4), (1, 0, 2)),
  "attn/kv_einsum/w": (["self_attn.k_proj", "self_attn.v_proj"], (8, 1, 4), (1, 0, 2)),
  "mlp/gating_einsum": (["mlp.gate_proj", "mlp.up_proj"], (8, 6), (1, 0)),
  "mlp/linear": (["mlp.down_proj"], (6, 8), None),
  "attn/_query_norm/scale": (["self_attn.q_norm"], (4,), None),
  "attn/_key_norm/scale": (["self_attn.k_norm"], (4,), None),
  "pre_attention_norm/scale": (["input_layernorm"], (8,), None),
  "post_attention_norm/scale": (["post_attention_layernorm"], (8,), None),
  "pre_ffw_norm/scale": (["pre_feedforward_layernorm"], (8,), None),
  "post_ffw_norm/scale": (["post_feedforward_layernorm"], (8,), None),
}


def model():
  c = base.GEMMA
  config = TransformerConfig(
    num_embed=c["vocab_size"],
    embed_dim=c["hidden_size"],
    hidden_dim=c["intermediate_size"],
    num_heads=c["num_attention_heads"],
    head_dim=c["head_dim"],
    num_kv_heads=c["num_key_value_heads"],
    final_logit_softcap=None,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    attention_types=(AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL),
    sliding_window_size=c["sliding_window"],
    use_qk_norm=True,
    transpose_gating_einsum=True,
    local_base_frequency=int(c["rope_local_base_freq"]),
    global_base_frequency=int(c["rope_theta"]),
  )
  made = _transformer.Transformer(
    config=config, tokens="batch.tokens", dtype=jnp.float32
  )
  return gm.nn.LoRA(rank=RANK, model=made, dtype=jnp.float32)


def weights():
  """The base's, in its tree."""
  found = base.weights(base.GEMMA)
  tree = {"embedder/input_embedding": found["model.embed_tokens.weight"]}
  tree["final_norm/scale"] = found["model.norm.weight"]
  for i in range(2):
    for name, (modules, shape, order) in KERNELS.items():
      parts = [found[f"model.layers.{i}.{m}.weight"] for m in modules]
      parts = [x.T.reshape(shape).transpose(order or range(len(shape))) for x in parts]
      if name == "mlp/gating_einsum":  # transpose_gating_einsum: (2, hidden, features)
        parts = [found[f"model.layers.{i}.{m}.weight"] for m in modules]
      value = np.stack(parts) if len(parts) > 1 else parts[0]
      tree[f"layer_{i}/{name}"] = value
  return {name: jnp.asarray(x) for name, x in tree.items()}


def logits(params):
  ids = jnp.asarray([base.IDS])
  found = model().apply({"params": params}, ids)
  return found.logits[0, -1].tolist()


if __name__ == "__main__":
  start = model().init(jax.random.key(0), jnp.asarray([base.IDS]))["params"]
  frozen, lora = peft.split_params(start)
  shapes = {k: x.shape for k, x in flatten_dict(frozen, sep="/").items()}
  assert shapes == {k: x.shape for k, x in weights().items()}, shapes
  flat = flatten_dict(lora, sep="/")
  for i, (name, leaf) in enumerate(sorted(flat.items())):
    flat[name] = jnp.asarray(base.value(i, *leaf.shape), jnp.float32)
  lora = unflatten_dict(flat, sep="/")
  params = peft.merge_params(unflatten_dict(weights(), sep="/"), lora)
  shutil.rmtree(OUT, ignore_errors=True)
  gm.ckpts.save_params(lora, OUT.absolute(), wait_until_finished=True)
  (OUT / "logits.json").write_text(json.dumps(logits(params)) + "\n")

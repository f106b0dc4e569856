"""The base of the files here: a tiny Llama whose weights are a formula."""

import numpy as np

CONFIG = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "vocab_size": 8,
  "hidden_size": 8,
  "intermediate_size": 6,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "head_dim": 4,
  "max_position_embeddings": 16,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "hidden_act": "silu",
  "tie_word_embeddings": False,
}
IDS = (3, 1, 4, 1, 5)


def value(seed, *shape):
  """Numbers within (-0.5, 0.5) that no two seeds share."""
  return (np.sin(1.7 * np.arange(np.prod(shape)) + 0.3 * seed) / 2).reshape(shape)


def weights():
  """The tensors of the checkpoint, by transformers' names, float32."""
  shapes = {"model.embed_tokens": (8, 8), "lm_head": (8, 8), "model.norm": (8,)}
  for i in range(2):
    layer = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8)}
    layer |= {"self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8)}
    layer |= {"mlp.gate_proj": (6, 8), "mlp.up_proj": (6, 8), "mlp.down_proj": (8, 6)}
    layer |= {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
    shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
  return {
    f"{name}.weight": (value(seed, *shape) + (len(shape) == 1)).astype(np.float32)
    for seed, (name, shape) in enumerate(sorted(shapes.items()))
  }

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
GEMMA = {
  **CONFIG,
  "architectures": ["Gemma3ForCausalLM"],
  "model_type": "gemma3_text",
  "rms_norm_eps": 1e-6,
  "query_pre_attn_scalar": 4,
  "hidden_activation": "gelu_pytorch_tanh",
  "sliding_window": 8,
  "sliding_window_pattern": 2,
  "rope_local_base_freq": 10000.0,
  "rope_theta": 1000000.0,
  "attn_logit_softcapping": None,
  "final_logit_softcapping": None,
  "tie_word_embeddings": True,
}
IDS = (3, 1, 4, 1, 5)


def value(seed, *shape):
  """Numbers within (-0.5, 0.5) that no two seeds share."""
  return (np.sin(1.7 * np.arange(np.prod(shape)) + 0.3 * seed) / 2).reshape(shape)


def weights(config=CONFIG):
  """The tensors of the checkpoint, by transformers' names, float32."""
  gemma = config is GEMMA
  shapes = {"model.embed_tokens": (8, 8), "model.norm": (8,)}
  shapes |= {} if gemma else {"lm_head": (8, 8)}
  for i in range(2):
    layer = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8)}
    layer |= {"self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8)}
    layer |= {"mlp.gate_proj": (6, 8), "mlp.up_proj": (6, 8), "mlp.down_proj": (8, 6)}
    layer |= {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
    if gemma:
      norms = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
      layer |= dict.fromkeys(norms, (8,))
      layer |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (4,))
    shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
  return {
    f"{name}.weight": (value(seed, *shape) + (len(shape) == 1)).astype(np.float32)
    for seed, (name, shape) in enumerate(sorted(shapes.items()))
  }

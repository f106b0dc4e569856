"""Writes mlx/ by mlx-lm's own functions, and its logits; needs mlx-lm alone.

pip install mlx-cpu mlx-lm; python tests/hub/adapters/written/make_mlx.py
"""

import json
from pathlib import Path

import base
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import save_config

OUT = Path(__file__).parent / "mlx"


def model():
  made = llama.Model(llama.ModelArgs.from_dict(base.CONFIG))
  made.load_weights([(k, mx.array(v)) for k, v in base.weights().items()])
  return made.eval()


def logits(folder):
  found = load_adapters(model(), folder).eval()(mx.array([base.IDS]))
  return np.array(found[0, -1]).tolist()


if __name__ == "__main__":
  trained = model()
  trained.freeze()
  keys = ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens", "lm_head"]
  parameters = {"rank": 2, "scale": 1.5, "dropout": 0.0, "keys": keys}
  linear_to_lora_layers(trained, 1, parameters)
  start = sorted(tree_flatten(trained.trainable_parameters()))
  values = (base.value(i, *x.shape) for i, (_, x) in enumerate(start))
  names = (name for name, _ in start)
  trained.load_weights(
    [
      (name, mx.array(x.astype(np.float32)))
      for name, x in zip(names, values, strict=True)
    ],
    strict=False,
  )
  OUT.mkdir(exist_ok=True)
  config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
  config |= {"model": "base", "seed": 0}
  save_config(config, OUT / "adapter_config.json")
  saved = dict(tree_flatten(trained.trainable_parameters()))
  mx.save_safetensors(str(OUT / "adapters.safetensors"), saved)
  (OUT / "logits.json").write_text(json.dumps(logits(OUT)) + "\n")

"""Writes torchtune/ by torchtune's own checkpointer, and its logits.

pip install torch torchtune torchao
python tests/hub/adapters/written/make_torchtune.py
"""

import json
import shutil
import tempfile
from pathlib import Path

import base
import torch
from torchtune import training
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import get_adapter_state_dict

OUT = Path(__file__).parent / "torchtune"
RANK, ALPHA = 2, 3.0


def model():
  c = base.CONFIG
  made = lora_llama3(
    ["q_proj", "k_proj"],
    apply_lora_to_mlp=True,
    apply_lora_to_output=True,
    vocab_size=c["vocab_size"],
    num_layers=c["num_hidden_layers"],
    num_heads=c["num_attention_heads"],
    num_kv_heads=c["num_key_value_heads"],
    embed_dim=c["hidden_size"],
    intermediate_dim=c["intermediate_size"],
    max_seq_len=c["max_position_embeddings"],
    rope_base=int(c["rope_theta"]),
    norm_eps=c["rms_norm_eps"],
    lora_rank=RANK,
    lora_alpha=ALPHA,
  )
  tensors = {k: torch.tensor(v) for k, v in base.weights().items()}
  made.load_state_dict(hf_to_tune(tensors, 2, 1, c["hidden_size"]), strict=False)
  return made.eval()


def logits(file):
  made = model()
  made.load_state_dict(torch.load(file, weights_only=True), strict=False)
  with torch.no_grad():
    return made(torch.tensor([base.IDS]))[0, -1].tolist()


if __name__ == "__main__":
  trained = model()
  adapter = get_adapter_state_dict(trained.state_dict())
  for i, name in enumerate(sorted(adapter)):
    value = base.value(i, *adapter[name].shape)
    adapter[name] = torch.tensor(value, dtype=torch.float32)
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    (folder / "base").mkdir()
    tensors = {k: torch.tensor(v) for k, v in base.weights().items()}
    torch.save(tensors, folder / "base" / "base.pt")
    checkpointer = training.FullModelTorchTuneCheckpointer(
      str(folder / "base"), ["base.pt"], "LLAMA3", str(folder / "out")
    )
    checkpointer.save_checkpoint(
      {training.ADAPTER_KEY: adapter}, epoch=0, adapter_only=True
    )
    OUT.mkdir(exist_ok=True)
    shutil.copy(folder / "out" / "epoch_0" / "adapter_model.pt", OUT)
  found = logits(OUT / "adapter_model.pt")
  (OUT / "logits.json").write_text(json.dumps(found) + "\n")

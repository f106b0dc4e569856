"""Mixtral 8x7B Instruct with rank-16 LoRA on all linear layers, trained on token ids.

Of 46,702,792,704 parameters 223,346,688 are trained: each of the eight experts of a
layer has factors of its own, and the routers stay as they are. The others lie in memory
as bfloat16, as they are stored. `:full` trains all of them instead, for comparison.

Expected result: none is published for data of one's own; the held-out perplexity falls.
`python -m launch.dryrun` says what a chip holds, without the model and without a chip.

Hardware: TPU v5e, 16 chips (4×4), by the dry run 14.5 of 16 GiB each and 2,188 tokens/s
a chip at most. A token is computed by its own two experts.
Command: python -m experiments.run --config=mixtral_8x7b_instruct.py \\
--config.data.path=FOLDER --workdir=DIR

FOLDER holds token ids as llama3_8b_instruct.py has them. The mesh has an axis of eight
for the experts (--config.mesh.expert), and the rest of the devices along fsdp.

Hyper-parameters: those of llama3_8b_instruct.py, from "LoRA Without Regret" and QLoRA
(arXiv 2305.14314). `:full` has a tenth of the learning rate. The shape is config.json's
of mistralai/Mixtral-8x7B-Instruct-v0.1.
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  shape = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
  }
  path = "mistralai/Mixtral-8x7B-Instruct-v0.1"
  config = common.instruct(path, shape, learning_rate=2e-4)
  config.lora.exclude = ".*/mlp/gate/weight"  # the routers
  config.mesh.expert = 8
  return common.or_full(
    "mixtral_8x7b_instruct", variant, config, full_learning_rate=2e-5
  )

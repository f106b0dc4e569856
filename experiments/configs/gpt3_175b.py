"""GPT-3's shape with the LoRA paper's rank 4 on attention, trained on token ids.

Of 174,604,259,328 parameters 18,874,368 are trained: 37.7 MB of adapter at 16 bits, the
paper's 35 MB, where the model is 350 GB. `:full` trains all of them instead, for
comparison: float32 masters, and Adam's two moments of each.

Expected result: none; in the paper GPU memory falls from 1.2 TB to 350 GB. No such
checkpoint is public: this config is for `python -m launch.dryrun`, or for a folder of
one's own.

Hardware: TPU v5e, 256 chips (16×16), by the dry run 10.3 of 16 GiB each; `:full` needs
17.4 of them, and so more or larger chips.
Command: python -m experiments.run --config=gpt3_175b.py --config.model.path=FOLDER \\
--config.data.path=FOLDER --workdir=DIR

Needs a GPT-2 checkpoint of this shape, and token ids as llama3_8b_instruct.py does.

Shape: 96 layers, 12,288 features, 96 heads, 2,048 positions, GPT-2's vocabulary (arXiv
2005.14165, its table 2.1). GPT-3 attends in bands in every other layer, and GPT-2, as
which it is computed here, to all in each: the sizes are the same.

Hyper-parameters: the LoRA paper's (arXiv 2106.09685, its appendix D.4): AdamW, batches
of 128, two epochs, linear decay, 250,000 tokens of warm-up (a step), weight decay 0.1,
learning rate 2e-4, 5e-6 for `:full`, and the length that SAMSum got. Alpha is the rank,
since the paper gives none. GPT-2 keeps query, key and value in one kernel, c_attn: rank
4 on it trains just as many parameters as the paper's rank 4 on query and on value.
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  config = common.next_token()
  config.model.path = "gpt3-175b"  # none is public
  config.model.hf_config = ConfigDict(
    {
      "model_type": "gpt2",
      "vocab_size": 50257,
      "n_positions": 2048,
      "n_embd": 12288,
      "n_layer": 96,
      "n_head": 96,
      "torch_dtype": "bfloat16",
    }
  )
  config.model.dropout = 0.0  # the paper names none
  config.data.max_length = 2048
  config.lora.targets = ".*/attn/c_attn/kernel"
  config.lora.rank = 4
  config.lora.alpha = 4.0
  config.train.epochs = 2.0
  config.train.batch_size = 128
  config.train.eval_batch_size = 128
  config.train.learning_rate = 2e-4
  config.train.warmup_steps = 1
  config.train.weight_decay = 0.1
  config.mesh.tensor = 2
  return common.or_full("gpt3_175b", variant, config, full_learning_rate=5e-6)

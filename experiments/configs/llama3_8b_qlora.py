"""Llama 3 8B Instruct in NF4 with rank-16 LoRA on all linear layers (QLoRA).

The kernels of the layers lie in memory as NF4 with double quantisation (arXiv
2305.14314), 4.127 bits a weight; embeddings, head and norms as bfloat16.

Expected result: none is published for data of one's own; the held-out perplexity falls.
`python -m launch.dryrun` says what a chip holds, without the model and without a chip.

Hardware: one TPU v5e chip, by the dry run 7.9 of 16 GiB;
--config.model.remat=attention computes less and takes 11.6.
Command: python -m experiments.run --config=llama3_8b_qlora.py \\
--config.data.path=FOLDER --workdir=DIR

Hyper-parameters: those of llama3_8b_instruct.py, as its data and model are, with
batches of 2 × 2,048 tokens.
"""

from ml_collections import ConfigDict

from experiments.configs import llama3_8b_instruct


def get_config() -> ConfigDict:
  config = llama3_8b_instruct.get_config()
  config.model.quant = "nf4"
  config.model.remat = "full"
  config.data.max_length = 2048
  config.train.batch_size = config.train.eval_batch_size = 2
  config.train.accumulation = 1
  return config

"""Llama 3 70B Instruct with rank-16 LoRA on all linear layers, trained on token ids.

Of 70,553,706,496 parameters 207,093,760 are trained; the others lie in memory as
bfloat16, as they are stored. `:full` trains all of them instead, for comparison, with
float32 masters and Adam's two moments of each.

Expected result: none is published for data of one's own; the held-out perplexity falls.
`python -m launch.dryrun` says what a chip holds, without the model and without a chip.

Hardware: TPU v5e, 64 chips (8×8), by the dry run 6.6 of 16 GiB each.
Command: python -m experiments.run --config=llama3_70b_instruct.py \\
--config.data.path=FOLDER --workdir=DIR

FOLDER holds token ids, and the model is gated, as llama3_8b_instruct.py says.

Hyper-parameters: those of llama3_8b_instruct.py but for the learning rate 1e-4, QLoRA's
(arXiv 2305.14314) for models of this size. `:full` has a tenth of it. The shape is
config.json's of meta-llama/Meta-Llama-3-70B-Instruct.
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  config = common.llama3(
    "meta-llama/Meta-Llama-3-70B-Instruct",
    layers=80,
    hidden=8192,
    heads=64,
    mlp=28672,
    learning_rate=1e-4,
  )
  config.mesh.fsdp = 16  # a row of the batch each
  config.mesh.tensor = -1
  return common.or_full("llama3_70b_instruct", variant, config, full_learning_rate=1e-5)

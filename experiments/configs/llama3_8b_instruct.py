"""Llama 3 8B Instruct with rank-16 LoRA on all linear layers, trained on token ids.

Of 8,030,261,248 parameters 41,943,040 are trained; the others lie in memory as
bfloat16, as they are stored. `:full` trains all of them instead, for comparison, with
float32 masters and Adam's two moments of each.

Expected result: none is published for data of one's own; the held-out perplexity falls.
`python -m launch.dryrun` says what a chip holds, without the model and without a chip.

Hardware: TPU v5e, 16 chips (4×4), by the dry run 8.1 of 16 GiB each;
--config.model.remat=full takes less memory and computes a third more.
Command: python -m experiments.run --config=llama3_8b_instruct.py \\
--config.data.path=FOLDER --workdir=DIR

FOLDER holds train.jsonl and validation.jsonl, a line for each example: {"input_ids":
[…], "loss_mask": […]}, where the mask, which may be left out, is 0 where a token is
read and not learnt, as a prompt's are. The model is gated: accept its terms on the hub
and set HF_TOKEN, or name a folder, --config.model.path=FOLDER.

Hyper-parameters: all linear layers, alpha 32 with 1/rank scaling and small batches as
"LoRA Without Regret" recommends; learning rate 2e-4, constant, batches of 16 and
clipping at 0.3 as QLoRA (arXiv 2305.14314) took for models of this size. `:full` has a
tenth of the learning rate. The shape is config.json's of
meta-llama/Meta-Llama-3-8B-Instruct.
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  config = common.llama3(
    "meta-llama/Meta-Llama-3-8B-Instruct",
    layers=32,
    hidden=4096,
    heads=32,
    mlp=14336,
    learning_rate=2e-4,
  )
  if not variant:  # There is room, but not beside masters and moments of all weights.
    config.model.remat = "inputs"
  return common.or_full("llama3_8b_instruct", variant, config, full_learning_rate=2e-5)

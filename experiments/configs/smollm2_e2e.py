"""SmolLM2 on 3,000 rows of E2E: rank-16 LoRA on all linear layers.

What the paper's configs (e2e_gpt2_medium.py) do, where there is no accelerator and
no more than a package registry's weights.

Expected result: perplexity 3.45 of 300 rows that are held out (28.1 before); of 60
meaning representations of the test set BLEU 53.1, NIST 7.05, METEOR 37.3, ROUGE-L 59.7
and CIDEr 1.71. The paper's GPT-2 medium has 70.4 BLEU, of 42,000 rows and 5 epochs.

Hardware: 2 CPU cores; 5 s of CPU time a step, some 20 minutes where both are free.
Data: the E2E challenge's trainset.csv, devset.csv and testset_w_refs.csv in FOLDER.
Command:
  python -m experiments.e2e --config=smollm2_e2e.py --config.data.path=FOLDER \\
    --workdir=DIR --rows=60
To train alone, with the same flags:
  python -m experiments.run --config=smollm2_e2e.py …

Hyper-parameters: those of chat.py. `:full` trains all weights instead, for comparison.
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  config = common.own_text()
  config.data.task = "e2e"
  config.data.max_length = 128
  config.data.buckets = 2
  config.data.train_rows = 3000
  config.data.eval_rows = 300
  config.train.epochs = 1.0
  return common.or_full("smollm2_e2e", variant, config, full_learning_rate=5e-5)

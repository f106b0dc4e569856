"""MRPC: do two sentences mean the same?

Expected (LoRA paper, table 2: validation set, accuracy,
median of 5 seeds, best epoch): 89.7 ± 0.7 with RoBERTa-base, where full fine-tuning has
90.2; `:large` 90.9 ± 1.2 with RoBERTa-large (full fine-tuning 90.9);
`:large_dagger` 90.2, the paper's setting for comparison with adapters;
`:xxlarge` 92.6 ± 0.6 with DeBERTa-v2-xxlarge (full fine-tuning 92.0).

The paper starts this task from the adapter that it trained on MNLI. Without
--config.init_adapter the recipe is the same but for that start, and scores lower
(`:large_dagger` is the paper's own recipe without it).

Hyper-parameters: the paper's table 9 (arXiv 2106.09685, appendix D); `:xxlarge` is its
table 10 with rank 16 and alpha 32. `common.glue` says what is from elsewhere.

Hardware: one accelerator with 16 GB is ample; 3,668 examples, 30 epochs of
230 steps. Data: TFDS glue/mrpc, downloaded at first use.
`:xxlarge` has 6 GB of weights, and a step takes 19 GB more by XLA's count.
Command:
  python -m experiments.run --config=glue_mrpc.py \
    --config.init_adapter=runs/glue_mnli/adapter
"""

from ml_collections import ConfigDict

from experiments.configs import common
from experiments.configs.common import Recipe


def get_config(variant: str | None = None) -> ConfigDict:
  return common.glue(
    "mrpc",
    variant,
    base=Recipe(16, 30, 4e-4),
    large=Recipe(4, 20, 3e-4),
    large_dagger=Recipe(4, 20, 3e-4, max_length=128),
    xxlarge=Recipe(32, 30, 2e-4, max_length=128, weight_decay=0.01, head_dropout=0.0),
  )

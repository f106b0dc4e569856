"""QQP: do two questions ask the same?

Expected (LoRA paper, table 2: validation set, accuracy,
median of 5 seeds, best epoch): 90.8 ± 0.1 with RoBERTa-base, where full fine-tuning has
91.9; `:large` 91.6 ± 0.1 with RoBERTa-large (full fine-tuning 92.2);
`:large_dagger` 91.6, the paper's setting for comparison with adapters;
`:xxlarge` 92.9 ± 0.1 with DeBERTa-v2-xxlarge (full fine-tuning 92.7).

Hyper-parameters: the paper's table 9 (arXiv 2106.09685, appendix D); `:xxlarge` is its
table 10 with rank 16 and alpha 32. `common.glue` says what is from elsewhere.

Hardware: one accelerator with 16 GB is ample; 363,846 examples, 25 epochs of
22,741 steps. Data: TFDS glue/qqp, downloaded at first use.
`:xxlarge` has 6 GB of weights, and a step takes 18 GB more by XLA's count.
Command: python -m experiments.run --config=glue_qqp.py
"""

from ml_collections import ConfigDict

from experiments.configs import common
from experiments.configs.common import Recipe


def get_config(variant: str | None = None) -> ConfigDict:
  return common.glue(
    "qqp",
    variant,
    base=Recipe(16, 25, 5e-4),
    large=Recipe(4, 20, 3e-4),
    large_dagger=Recipe(4, 20, 3e-4, max_length=128),
    xxlarge=Recipe(8, 11, 1e-4, max_length=320, weight_decay=0.01, head_dropout=0.2),
  )

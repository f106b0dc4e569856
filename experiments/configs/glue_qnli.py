"""QNLI: does a sentence answer a question?

Expected (LoRA paper, table 2: validation set, accuracy,
median of 5 seeds, best epoch): 93.3 ± 0.3 with RoBERTa-base, where full fine-tuning has
92.8; `:large` 94.9 ± 0.3 with RoBERTa-large (full fine-tuning 94.7);
`:large_dagger` 94.8, the paper's setting for comparison with adapters;
`:xxlarge` 96.0 ± 0.1 with DeBERTa-v2-xxlarge (full fine-tuning 96.0).

Hyper-parameters: the paper's table 9 (arXiv 2106.09685, appendix D); `:xxlarge` is its
table 10 with rank 16 and alpha 32. `common.glue` says what is from elsewhere.

Hardware: one accelerator with 16 GB is ample; 104,743 examples, 25 epochs of
3,274 steps. Data: TFDS glue/qnli, downloaded at first use.
`:xxlarge` has 6 GB of weights, and a step takes 27 GB more by XLA's count.
Command: python -m experiments.run --config=glue_qnli.py
"""

from ml_collections import ConfigDict

from experiments.configs import common
from experiments.configs.common import Recipe


def get_config(variant: str | None = None) -> ConfigDict:
  return common.glue(
    "qnli",
    variant,
    base=Recipe(32, 25, 4e-4),
    large=Recipe(4, 10, 2e-4),
    large_dagger=Recipe(4, 10, 2e-4, max_length=128),
    xxlarge=Recipe(6, 8, 1e-4, weight_decay=0.01, head_dropout=0.1),
  )

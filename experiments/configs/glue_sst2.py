"""SST-2: is a sentence of a film review positive?

Expected (LoRA paper, table 2: validation set, accuracy,
median of 5 seeds, best epoch): 95.1 ± 0.2 with RoBERTa-base, where full fine-tuning has
94.8; `:large` 96.2 ± 0.5 with RoBERTa-large (full fine-tuning 96.4);
`:large_dagger` 96.2, the paper's setting for comparison with adapters;
`:xxlarge` 96.9 ± 0.2 with DeBERTa-v2-xxlarge (full fine-tuning 97.2).

Hyper-parameters: the paper's table 9 (arXiv 2106.09685, appendix D); `:xxlarge` is its
table 10 with rank 16 and alpha 32. `common.glue` says what is from elsewhere.

Hardware: one accelerator with 16 GB is ample; 67,349 examples, 60 epochs of
4,210 steps. Data: TFDS glue/sst2, downloaded at first use.
`:xxlarge` has 6 GB of weights, and a step takes 5 GB more by XLA's count.
Command: python -m experiments.run --config=glue_sst2.py
"""

from ml_collections import ConfigDict

from experiments.configs import common
from experiments.configs.common import Recipe


def get_config(variant: str | None = None) -> ConfigDict:
  return common.glue(
    "sst2",
    variant,
    base=Recipe(16, 60, 5e-4),
    large=Recipe(4, 10, 4e-4, max_length=128),
    large_dagger=Recipe(4, 10, 4e-4, max_length=128),
    xxlarge=Recipe(8, 16, 6e-5, max_length=128, weight_decay=0.01, head_dropout=0.0),
  )

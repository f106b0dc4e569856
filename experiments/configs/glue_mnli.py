"""MNLI: does a premise entail, contradict or say nothing of a hypothesis?

Expected (LoRA paper, table 2: both validation sets together, accuracy,
median of 5 seeds, best epoch): 87.5 ± 0.3 with RoBERTa-base, where full fine-tuning has
87.6; `:large` 90.6 ± 0.2 with RoBERTa-large (full fine-tuning 90.2);
`:large_dagger` 90.6, the paper's setting for comparison with adapters;
`:xxlarge` 91.9 ± 0.2 with DeBERTa-v2-xxlarge (full fine-tuning 91.8).

Hyper-parameters: the paper's table 9 (arXiv 2106.09685, appendix D); `:xxlarge` is its
table 10 with rank 16 and alpha 32. `common.glue` says what is from elsewhere.

Hardware: one accelerator with 16 GB is ample; 392,702 examples, 30 epochs of
24,544 steps. Data: TFDS glue/mnli, downloaded at first use.
`:xxlarge` has 6 GB of weights, and a step takes 13 GB more by XLA's count.
Command: python -m experiments.run --config=glue_mnli.py
"""

from ml_collections import ConfigDict

from experiments.configs import common
from experiments.configs.common import Recipe


def get_config(variant: str | None = None) -> ConfigDict:
  return common.glue(
    "mnli",
    variant,
    base=Recipe(16, 30, 5e-4),
    large=Recipe(4, 10, 3e-4, max_length=128),
    large_dagger=Recipe(4, 10, 3e-4, max_length=128),
    xxlarge=Recipe(8, 5, 1e-4, max_length=256, weight_decay=0.0, head_dropout=0.15),
  )

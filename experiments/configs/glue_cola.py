"""CoLA: is a sentence acceptable English?

Expected (LoRA paper, table 2: validation set, Matthews correlation,
median of 5 seeds, best epoch): 63.4 ± 1.2 with RoBERTa-base, where full fine-tuning has
63.6; `:large` 68.2 ± 1.9 with RoBERTa-large (full fine-tuning 68.0);
`:large_dagger` 68.2, the paper's setting for comparison with adapters;
`:xxlarge` 72.4 ± 1.1 with DeBERTa-v2-xxlarge (full fine-tuning 72.0).

Hyper-parameters: the paper's table 9 (arXiv 2106.09685, appendix D); `:xxlarge` is its
table 10 with rank 16 and alpha 32. `common.glue` says what is from elsewhere.

Hardware: one accelerator with 16 GB is ample; 8,551 examples, 80 epochs of
268 steps. Data: TFDS glue/cola, downloaded at first use.
`:xxlarge` has 6 GB of weights, and a step takes 1 GB more by XLA's count.
Command: python -m experiments.run --config=glue_cola.py
"""

from ml_collections import ConfigDict

from experiments.configs import common
from experiments.configs.common import Recipe


def get_config(variant: str | None = None) -> ConfigDict:
  return common.glue(
    "cola",
    variant,
    base=Recipe(32, 80, 4e-4),
    large=Recipe(4, 20, 2e-4, max_length=128),
    large_dagger=Recipe(4, 20, 2e-4, max_length=128),
    xxlarge=Recipe(4, 10, 1e-4, max_length=64, weight_decay=0.0, head_dropout=0.1),
  )

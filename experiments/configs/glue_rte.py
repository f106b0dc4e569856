"""RTE: does one text entail the other?

Expected (LoRA paper, table 2: validation set, accuracy,
median of 5 seeds, best epoch): 86.6 ± 0.7 with RoBERTa-base, where full fine-tuning has
78.7; `:large` 87.4 ± 2.5 with RoBERTa-large (full fine-tuning 86.6);
`:large_dagger` 85.2 ± 1.1, the paper's setting for comparison with adapters;
`:xxlarge` 94.9 ± 0.4 with DeBERTa-v2-xxlarge (full fine-tuning 93.9).

The paper starts this task from the adapter that it trained on MNLI. Without
--config.init_adapter the recipe is the same but for that start, and scores lower
(`:large_dagger` is the paper's own recipe without it).

Hyper-parameters: the paper's table 9 (arXiv 2106.09685, appendix D); `:xxlarge` is its
table 10 with rank 16 and alpha 32. `common.glue` says what is from elsewhere.

Hardware: one accelerator with 16 GB is ample; 2,490 examples, 80 epochs of
78 steps. Data: TFDS glue/rte, downloaded at first use.
`:xxlarge` has 6 GB of weights, and a step takes 9 GB more by XLA's count.
Command:
  python -m experiments.run --config=glue_rte.py \
    --config.init_adapter=runs/glue_mnli/adapter
"""

from ml_collections import ConfigDict

from experiments.configs import common
from experiments.configs.common import Recipe


def get_config(variant: str | None = None) -> ConfigDict:
  return common.glue(
    "rte",
    variant,
    base=Recipe(32, 80, 5e-4),
    large=Recipe(8, 20, 4e-4),
    large_dagger=Recipe(4, 20, 4e-4, max_length=128),
    xxlarge=Recipe(4, 11, 2e-4, max_length=320, weight_decay=0.01, head_dropout=0.2),
  )

"""STS-B: how alike are two sentences, from 0 to 5?

Expected (LoRA paper, table 2: validation set, Pearson correlation,
median of 5 seeds, best epoch): 91.5 ± 0.2 with RoBERTa-base, where full fine-tuning has
91.2; `:large` 92.6 ± 0.2 with RoBERTa-large (full fine-tuning 92.4);
`:large_dagger` 92.3, the paper's setting for comparison with adapters;
`:xxlarge` 93.0 ± 0.2 with DeBERTa-v2-xxlarge (full fine-tuning 92.9).

The paper starts this task from the adapter that it trained on MNLI. Without
--config.init_adapter the recipe is the same but for that start, and scores lower
(`:large_dagger` is the paper's own recipe without it).

Hyper-parameters: the paper's table 9 (arXiv 2106.09685, appendix D); `:xxlarge` is its
table 10 with rank 16 and alpha 32. `common.glue` says what is from elsewhere.

Hardware: one accelerator with 16 GB is ample; 5,749 examples, 40 epochs of
360 steps. Data: TFDS glue/stsb, downloaded at first use.
`:xxlarge` has 6 GB of weights, and a step takes 3 GB more by XLA's count.
Command:
  python -m experiments.run --config=glue_stsb.py \
    --config.init_adapter=runs/glue_mnli/adapter
"""

from ml_collections import ConfigDict

from experiments.configs import common
from experiments.configs.common import Recipe


def get_config(variant: str | None = None) -> ConfigDict:
  return common.glue(
    "stsb",
    variant,
    base=Recipe(16, 40, 4e-4),
    large=Recipe(8, 30, 2e-4),
    large_dagger=Recipe(4, 10, 2e-4, max_length=128),
    xxlarge=Recipe(4, 10, 2e-4, max_length=128, head_dropout=0.2),
  )

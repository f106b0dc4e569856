"""A T5 on prompts and completions of your own: rank-16 LoRA on all linear layers.

T5-small by default, which is fetched from the hub; any other T5, v1.1 and FLAN too, by
--config.model.path.

Expected result: depends on the texts; the held-out perplexity of completions falls.

Hardware: 2 CPU cores, some minutes for a thousand short pairs.
Command: python -m experiments.run --config=seq2seq.py --config.data.path=FILE \\
--workdir=DIR

FILE is .jsonl, .csv, .tsv or .parquet with the columns prompt and completion;
--config.data.columns.completion=summary names a column that is called otherwise. A
tenth of its rows is held out. Or a folder with train and validation files. Prompts are
truncated to data.max_length tokens, completions to data.max_target_length.

Hyper-parameters: every linear layer, alpha 32 with 1/rank scaling and small batches as
"LoRA Without Regret" recommends. `:full` trains all weights instead, for comparison.
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  config = common.own_text()
  config.model.path = "google-t5/t5-small"
  config.model.scan = False  # 6 layers
  config.data.task = "seq2seq"
  config.data.buckets = 2
  return common.or_full("seq2seq", variant, config, full_learning_rate=1e-4)

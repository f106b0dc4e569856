"""A language model on texts of your own: rank-16 LoRA on all linear layers.

SmolLM2-135M by default, which needs nothing but a package registry; any other decoder
by --config.model.path.

Expected result: depends on the texts; the held-out perplexity falls.

Hardware: 2 CPU cores, some minutes for a few hundred pages.
Command: python -m experiments.run --config=complete.py --config.data.path=FILE \\
--workdir=DIR

FILE is .jsonl, .csv, .tsv or .parquet with the columns prompt and completion, of which
the completion is learnt, or text, of which all is; --config.data.columns.text=body
names a column that is called otherwise. A tenth of its rows is held out. Or a folder
with train and validation files.

Documents are cut one after another into windows of data.max_length tokens;
--config.data.documents=rows takes one row from each.

Hyper-parameters: every linear layer, alpha 32 with 1/rank scaling and small batches as
"LoRA Without Regret" recommends. `:full` trains all weights instead, for comparison.
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  config = common.own_text()
  return common.or_full("complete", variant, config, full_learning_rate=5e-5)

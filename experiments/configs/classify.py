"""Your own texts with labels: classes, a number, or several classes at once.

DATA is a file (CSV, TSV, JSON lines, Parquet) with the columns text and label, and
text_pair where there are two texts, or a folder with train and validation files.
--config.data.columns.label=sentiment names a column that is called otherwise. Of a
single file a tenth is held out. Any encoder will do: --config.model.path=MODEL.

Expected: what your data allows. On 2,000 headlines of quickstart.py, as a CSV, accuracy
0.899 and macro F1 0.898 on the 198 of them that are held out.

Hardware: 2 CPU cores, which take three minutes for those 2,000 headlines.
Command:
  python -m experiments.run --config=classify.py --config.data.path=DATA \
    --config.data.columns.text=Review --config.data.columns.label=sentiment

`lorax data DATA --config.model.path=MODEL` shows what is found in the data, and trains
nothing.

Hyper-parameters: those of quickstart.py, over three epochs: rank 8 on every linear
layer, at ten times the learning rate of full fine-tuning, as "LoRA Without Regret"
recommends. `:full` trains all weights instead.
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  config = common.base()
  config.model.dropout = 0.0
  config.data.task = "texts"
  config.data.buckets = 2
  config.lora.targets = "all-linear"
  config.lora.rank = 8
  config.lora.alpha = 16.0
  config.train.epochs = 3.0
  config.train.batch_size = 32
  config.train.learning_rate = 2e-3
  config.train.warmup_fraction = 0.06
  return common.or_full("classify", variant, config, full_learning_rate=2e-4)

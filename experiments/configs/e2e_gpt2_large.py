"""GPT-2 large on E2E by the LoRA paper's recipe: rank 4 on query and value.

Expected result (LoRA paper, table 3, test set): BLEU 70.4, NIST 8.89, METEOR 46.8,
ROUGE-L 72.0, CIDEr 2.47; full fine-tuning has 68.5, 8.78, 46.0, 69.9, 2.45. It has not
been run here: no registry carries the weights.

737,280 parameters are trained (36 layers, two parts of 4 × 2 × 1,280); the paper's
table says 0.77M.

Hyper-parameters: the paper's table 11 (arXiv 2106.09685); `common.e2e` says what is
from elsewhere. The texts are searched with 10 beams, no n-gram of 4 twice, and a length
penalty of 0.8, the released script's (the paper: --length_penalty=0.9).

Hardware: one accelerator with 16 GB; 42,061 rows, 5 epochs of 5,258 steps.
Data: the challenge's trainset.csv, devset.csv and testset_w_refs.csv in FOLDER.
Command:
  python -m experiments.e2e --config=e2e_gpt2_large.py --config.data.path=FOLDER \\
    --workdir=DIR
To train alone, with the same flags:
  python -m experiments.run --config=e2e_gpt2_large.py …
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config() -> ConfigDict:
  return common.e2e("openai-community/gpt2-large")

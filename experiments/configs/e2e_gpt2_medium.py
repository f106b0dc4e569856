"""GPT-2 medium on E2E by the LoRA paper's recipe: rank 4 on query and value.

Expected result (LoRA paper, table 3, test set): BLEU 70.4, NIST 8.85, METEOR 46.8,
ROUGE-L 71.8, CIDEr 2.53; full fine-tuning has 68.2, 8.62, 46.2, 71.0, 2.47. It has not
been run here: no registry carries the weights.

393,216 parameters are trained (24 layers, two parts of 4 × 2 × 1,024); the paper's
table says 0.35M.

Hyper-parameters: the paper's table 11 (arXiv 2106.09685); `common.e2e` says what is
from elsewhere. The texts are searched with 10 beams, no n-gram of 4 twice, and a length
penalty of 0.8, the released script's (the paper: --length_penalty=0.9).

Hardware: one accelerator with 16 GB; 42,061 rows, 5 epochs of 5,258 steps.
Data: the challenge's trainset.csv, devset.csv and testset_w_refs.csv in FOLDER.
Command:
  python -m experiments.e2e --config=e2e_gpt2_medium.py --config.data.path=FOLDER \\
    --workdir=DIR
To train alone, with the same flags:
  python -m experiments.run --config=e2e_gpt2_medium.py …
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config() -> ConfigDict:
  return common.e2e("openai-community/gpt2-medium")

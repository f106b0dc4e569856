"""A language model on chats of your own: rank-16 LoRA on all linear layers.

SmolLM2-135M-Instruct by default, which needs nothing but a package registry; any other
decoder with a chat template by --config.model.path. What the assistant says is learnt,
the rest is read.

Expected result: depends on the chats; the held-out perplexity of the assistant's turns
falls.

Hardware: 2 CPU cores, some minutes for a few hundred turns.
Command: python -m experiments.run --config=chat.py --config.data.path=FILE \\
--workdir=DIR

FILE is JSON lines, {"messages": [{"role": "user", "content": …}, {"role": "assistant",
"content": …}, …]}, with "tools" where the template takes them; a tenth of its rows is
held out. Or a folder with train and validation files.

Hyper-parameters: every linear layer, alpha 32 with 1/rank scaling and small batches as
"LoRA Without Regret" recommends. `:full` trains all weights instead, for comparison.
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  config = common.own_text()
  return common.or_full("chat", variant, config, full_learning_rate=5e-5)

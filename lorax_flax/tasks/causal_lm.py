"""Token ids, each of which is to follow from those before it."""

from collections.abc import Callable
from pathlib import Path

from lorax_flax.data import sequences
from lorax_flax.errors import LoraxError
from lorax_flax.jobs.settings import DataSettings, Settings
from lorax_flax.models.registry import Loaded
from lorax_flax.tasks.task import Kind, Splits
from lorax_flax.train import losses

_TRAIN, _HELD_OUT = "train", "validation"


def kind(wanted: Settings) -> Kind:
  """Cross entropy of the next token; losses and perplexity are means over tokens."""
  return Kind(
    name=wanted.data.task,
    model="causal-lm",
    num_labels=None,
    labels=None,
    read=lambda loaded, say: _read(wanted.data, loaded, say),
    blank=lambda model, length: sequences.blank(length),
    loss=losses.next_token(wanted.train.label_smoothing),
    eval_loss=losses.next_token(),  # Of which a perplexity can be made.
    predictions=lambda logits_BxTxV: None,  # A vocabulary is wide.
    metrics=("perplexity",),
    primary="perplexity",
  )


def _read(wanted: DataSettings, loaded: Loaded, say: Callable[[str], None]) -> Splits:
  if wanted.path is None:
    raise LoraxError(
      f"data.path: which folder has {_TRAIN}.jsonl and {_HELD_OUT}.jsonl?"
    )
  folder = Path(wanted.path).expanduser()
  found = {}
  for name in (_TRAIN, _HELD_OUT):
    file = folder / f"{name}.jsonl"
    found[name], cut = sequences.read(
      file,
      max_length=wanted.max_length,
      vocab_size=loaded.config.vocab_size,
      pad_id=getattr(loaded.config, "pad_token_id", None) or 0,
    )
    if cut.rows:
      total = len(found[name].labels_S) + cut.tokens
      say(
        f"{file}: {cut.rows:,} of {len(found[name]):,} examples are cut to "
        f"data.max_length = {wanted.max_length} tokens; {cut.tokens:,} of {total:,} "
        "tokens are left out"
      )
  return Splits(found.pop(_TRAIN), found)

"""All metrics of generated texts, as the E2E challenge's script has them."""

from collections.abc import Mapping, Sequence

from lorax_flax.errors import LoraxError
from lorax_flax.metrics import captions, ngrams

NAMES = ("BLEU", "NIST", *captions.NAMES)


def scores(
  outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> Mapping[str, float | None]:
  """Scores by `NAMES`, on their own scales: BLEU from 0 to 1.

  Args:
    outputs: a text for each group of references.
    references: one or more for each output.

  Returns:
    The scores; None for the metrics that need Java, where there is none.

  Raises:
    LoraxError: no outputs, other numbers of them, a group without references.
  """
  if not outputs or len(outputs) != len(references):
    raise LoraxError(
      f"{len(outputs):,} outputs for {len(references):,} groups of references: one is "
      "needed for each"
    )
  if empty := [
    n for n, own in enumerate(references, 1) if not any(map(str.strip, own))
  ]:
    raise LoraxError(f"group {empty[0]} has no reference")
  found: dict[str, float | None] = {
    "BLEU": ngrams.bleu(outputs, references),
    "NIST": ngrams.nist(outputs, references),
  }
  if captions.has_java():
    return found | captions.scores(outputs, references)
  return found | dict.fromkeys(captions.NAMES)

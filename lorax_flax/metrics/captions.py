"""METEOR, ROUGE-L and CIDEr of the COCO captions' evaluation (pycocoevalcap).

The texts are in Stanford's PTB tokens, lower-case and without punctuation. Both that
tokenizer and METEOR are Java programs, which the package brings with it.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lorax_flax.errors import LoraxError
from lorax_flax.metrics import extra

# Each text's by its number; a list, as the scorers take one.
Tokenized = dict[int, list[str]]
NAMES = ("METEOR", "ROUGE-L", "CIDEr")
_TOKENIZER = "pycocoevalcap.tokenizer.ptbtokenizer"
_PROGRAM = "edu.stanford.nlp.process.PTBTokenizer"


def has_java() -> bool:
  """True where the command java is found."""
  return shutil.which("java") is not None


def scores(
  outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
  """The three metrics, by `NAMES`.

  Args:
    outputs: a text each.
    references: one or more for each output.

  Raises:
    LoraxError: the extra is not installed, or Java fails.
  """
  meteor = extra.module("pycocoevalcap.meteor.meteor")
  rouge = extra.module("pycocoevalcap.rouge.rouge")
  cider = extra.module("pycocoevalcap.cider.cider")
  said = _tokenized([[text] for text in outputs])
  known = _tokenized(references)
  return {
    "METEOR": _meteor(meteor.Meteor(), known, said),
    "ROUGE-L": float(rouge.Rouge().compute_score(known, said)[0]),
    "CIDEr": float(cider.Cider().compute_score(known, said)[0]),
  }


def _meteor(scorer, known: Tokenized, said: Tokenized) -> float:
  try:
    return float(scorer.compute_score(known, said)[0])
  except (ValueError, BrokenPipeError) as error:
    raise LoraxError(f"METEOR's Java program gives no score: {error}") from error
  finally:  # The package itself leaves these open.
    scorer.meteor_p.stdout.close()
    scorer.meteor_p.stderr.close()


def _tokenized(groups: Sequence[Sequence[str]]) -> Tokenized:
  """Texts in tokens, with spaces between them, by the number of the group."""
  module = extra.module(_TOKENIZER)
  jar = Path(module.__file__).parent / module.STANFORD_CORENLP_3_4_1_JAR
  # The package's own call writes a file beside its code.
  command = ["java", "-cp", str(jar), _PROGRAM, "-preserveLines", "-lowerCase"]
  lines = [" ".join(text.split()) for group in groups for text in group]
  done = subprocess.run(
    [*command, "-encoding", "utf-8"],
    input="\n".join(lines) + "\n",
    capture_output=True,
    encoding="utf-8",
    check=False,
  )
  words = [
    " ".join(word for word in line.split() if word not in module.PUNCTUATIONS)
    for line in done.stdout.split("\n")[:-1]
  ]
  if done.returncode or len(words) != len(lines):
    raise LoraxError(f"the PTB tokenizer's Java program failed: {done.stderr[-300:]}")
  taken = iter(words)
  return {i: [next(taken) for _ in group] for i, group in enumerate(groups)}

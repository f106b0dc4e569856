"""BLEU and NIST of a corpus with several references for each text, as mteval-v13a.

Both are of lower-case texts in its tokens, as the E2E challenge's script has them.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

from lorax_flax.metrics import extra

References = Sequence[Sequence[str]]
# N-grams of a text by their numbers, those of all lengths.
Counts = Counter[tuple[str, ...]]
_LONGEST = 5
# So that a text of two thirds of the references' length is worth half.
_BETA = -math.log(0.5) / math.log(1.5) ** 2


def bleu(outputs: Sequence[str], references: References) -> float:
  """BLEU, 0 to 1: sacrebleu's, of 13a tokens in lower case, not smoothed."""
  scorer = extra.module("sacrebleu.metrics").BLEU(
    lowercase=True, tokenize="13a", smooth_method="none"
  )
  most = max(map(len, references))
  # A stream holds a reference of each text; None where that has fewer.
  streams = [
    [own[i] if i < len(own) else None for own in references] for i in range(most)
  ]
  return scorer.corpus_score(list(outputs), streams).score / 100


def nist(outputs: Sequence[str], references: References) -> float:
  """NIST (Doddington 2002), of n-grams up to 5, not bounded.

  Here, since nltk's takes the best reference of each text, and mteval, as the E2E
  challenge's Python version has it, takes the n-grams of all of them.
  """
  tokenize = _tokenizer()
  known: Counts = Counter()
  matched: list[Counts] = []
  lengths, reference_length = [0] * _LONGEST, 0.0
  for output, own in zip(outputs, references, strict=True):
    tokens, tokens_of = tokenize(output), [tokenize(text) for text in own]
    counts = [_counts(words) for words in tokens_of]
    largest: Counts = Counter()
    for each in counts:
      known.update(each)
      largest |= each
    matched.append(_counts(tokens) & largest)
    lengths = [n + len(tokens) - i for i, n in enumerate(lengths)]
    total = sum(map(len, tokens_of))
    known[()] += total
    reference_length += total / len(own)
  hits = [0.0] * _LONGEST
  for found in matched:
    for ngram, number in found.items():
      hits[len(ngram) - 1] += number * math.log2(known[ngram[:-1]] / known[ngram])
  pairs = zip(hits, lengths, strict=True)
  ratio = lengths[0] / reference_length
  if ratio <= 0:
    return 0.0
  brevity = 1.0 if ratio >= 1 else math.exp(-_BETA * math.log(ratio) ** 2)
  return brevity * sum(hit / length for hit, length in pairs if length > 0)


def _tokenizer() -> Callable[[str], list[str]]:
  split = extra.module("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
  return lambda text: split(text.lower()).split()


def _counts(tokens: Sequence[str]) -> Counts:
  return Counter(
    tuple(tokens[i : i + n])
    for n in range(1, _LONGEST + 1)
    for i in range(len(tokens) - n + 1)
  )

"""The metrics of generated texts, against the E2E challenge's own script.

The expected scores are what github.com/tuetschek/e2e-metrics prints for its example
inputs, which are in e2e_examples: measure_scores.py -p devel-conc.txt
baseline-output.txt.
"""

from pathlib import Path

import pycocoevalcap  # noqa: F401 (left out where it is not installed)
import pytest
import sacrebleu  # noqa: F401

from experiments.inference import scored
from lorax_flax.errors import LoraxError
from lorax_flax.metrics import captions, ngrams, texts

EXAMPLES = Path(__file__).parent / "e2e_examples"
OFFICIAL = {
  "BLEU": 0.7203,
  "NIST": 7.7889,
  "METEOR": 0.4801,
  "ROUGE-L": 0.7910,
  "CIDEr": 2.3039,
}


@pytest.fixture(scope="module")
def examples():
  outputs = scored.outputs(EXAMPLES / "baseline-output.txt")
  references = scored.references(EXAMPLES / "devel-conc.txt")
  assert list(map(len, references)) == [6, 6, 6, 6, 9, 11, 37, 39, 10, 7]
  return outputs, references


@pytest.mark.skipif(not captions.has_java(), reason="there is no Java")
def test_all_are_those_of_the_official_script(examples):
  found = texts.scores(*examples)
  assert tuple(found) == texts.NAMES
  assert {name: round(score, 4) for name, score in found.items()} == OFFICIAL


def test_without_java_the_others_are_left_out_by_name(examples, monkeypatch):
  monkeypatch.setenv("PATH", "")
  found = texts.scores(*examples)
  bleu, nist = found.pop("BLEU"), found.pop("NIST")
  assert (round(bleu, 4), round(nist, 4)) == (OFFICIAL["BLEU"], OFFICIAL["NIST"])
  assert found == dict.fromkeys(captions.NAMES)
  assert scored.shown({"CIDEr": None}).split()[-2:] == ["needs", "Java"]


def test_short_outputs_lose_nist_by_the_mean_length_of_their_references():
  # mteval's numbers: info 1 for each of two of four words seen once each of four.
  found = ngrams.nist(["a b"], [["a b c d"]])
  assert found == pytest.approx((2 * 2 / 2) * 2 ** -((_ratio(0.5)) ** 2))
  assert ngrams.nist(["e"], [["a"]]) == 0


def _ratio(share):
  import math

  return math.log(share) / math.log(1.5)


@pytest.mark.parametrize(
  ("outputs", "references", "message"),
  [
    (["a"], [["a"], ["b"]], "1 outputs for 2 groups"),
    ([], [], "0 outputs"),
    (["a", "b"], [["a"], [""]], "group 2 has no reference"),
  ],
)
def test_numbers_that_differ_are_refused(outputs, references, message):
  with pytest.raises(LoraxError, match=message):
    texts.scores(outputs, references)

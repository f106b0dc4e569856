"""Per-class scores, confusion tables and averages, as scikit-learn has them."""

import numpy as np
import pytest
import sklearn.metrics

from lorax_flax.train import evaluate, metrics, report
from lorax_flax.train.checkpoint import Progress
from lorax_flax.train.config import Durations
from lorax_flax.train.evaluate import Evaluation
from lorax_flax.train.logs import confusion
from lorax_flax.train.logs.history import History
from lorax_flax.train.logs.writer import SilentRecord
from lorax_flax.train.metrics import Mean
from lorax_flax.train.objective import Objective

NAMES = ("cost $5_a$", "b", "c", "unseen")
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(60, 4)).astype(np.float32)
LOGITS[:, 3] = -9.0  # a class that is neither true nor predicted
LABELS = RNG.integers(0, 3, 60).astype(np.int32)
SEVERAL = RNG.integers(0, 2, (60, 4)).astype(np.float32)


def test_a_report_of_classes_is_scikit_learns():
  found = report.of_classes(NAMES)(LOGITS, LABELS)
  predicted = LOGITS.argmax(-1)
  theirs = sklearn.metrics.classification_report(
    LABELS,
    predicted,
    labels=range(4),
    target_names=NAMES,
    output_dict=True,
    zero_division=0,
  )
  for name in NAMES:
    own = dict(found["classes"][name])
    assert own.pop("f1") == theirs[name].pop("f1-score")
    assert own == theirs[name]
  assert found["classes"]["unseen"]["support"] == 0
  table = np.zeros((4, 4), int)
  np.add.at(table, (LABELS, predicted), 1)
  assert found["confusion"] == {"labels": list(NAMES), "rows": table.tolist()}
  assert found["macro_f1"] == pytest.approx(
    np.mean([found["classes"][name]["f1"] for name in NAMES[:3]])
  )


def test_a_report_of_several_classes_has_no_confusion():
  found = report.of_classes(NAMES)(LOGITS, SEVERAL)
  predicted = LOGITS > 0
  assert "confusion" not in found
  for number, name in enumerate(NAMES):
    assert found["classes"][name]["f1"] == sklearn.metrics.f1_score(
      SEVERAL[:, number], predicted[:, number], zero_division=0
    )


def test_metrics_of_several_classes_are_over_decisions_and_rows():
  names = ("micro_f1", "macro_f1", "exact_match")
  found = metrics.compute(names, LOGITS, SEVERAL)
  predicted = LOGITS > 0
  right = (predicted == SEVERAL).all(-1).mean()
  assert found["exact_match"] == pytest.approx(right)
  hits = (predicted * SEVERAL).sum(0)
  f1 = 2 * hits / (predicted.sum(0) + SEVERAL.sum(0))
  assert found["macro_f1"] == pytest.approx(f1.mean())
  total = 2 * hits.sum() / (predicted.sum() + SEVERAL.sum())
  assert found["micro_f1"] == pytest.approx(total)


def test_a_correlation_of_one_row_is_none():
  one = (np.ones((1, 1), np.float32), np.ones(1, np.float32))
  assert metrics.compute(("pearson", "spearman"), *one) == {
    "pearson": 0.0,
    "spearman": 0.0,
  }


def test_an_evaluation_reports_all_its_splits_together():
  def batch(rows):
    index = np.arange(len(rows), dtype=np.int32)
    return {"index": index, "labels": LABELS[rows]}

  rows = {"validation_a": np.arange(20), "validation_b": np.arange(20, 60)}
  found = evaluate.evaluate(
    {split: [(LOGITS[own], Mean(1.0, 1.0))] for split, own in rows.items()},
    {split: [batch(own)] for split, own in rows.items()},
    ("accuracy",),
    report.of_classes(NAMES),
  )
  assert found.report == report.of_classes(NAMES)(LOGITS, LABELS)


def test_a_picture_of_the_table_is_a_png(tmp_path):
  table = report.of_classes(NAMES)(LOGITS, LABELS)["confusion"]
  confusion.draw(tmp_path / "confusion.png", table, "a_title with $x^{2$")
  assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_a_result_has_the_report_of_the_best_evaluation_alone():
  objective = Objective(lambda *_: None, ("accuracy",), "accuracy")
  plan = Durations(total=3, epoch=1, warmup=0, save=None)
  history = History(SilentRecord(), plan, objective, "stop", Progress(position={}))
  for step, score in enumerate((0.4, 0.9, 0.6), 1):
    values = {"accuracy": score, "loss": 1.0}
    history.evaluated(step, Evaluation(values, 5, {"macro_f1": score}))
  assert history.result(1, {"steps": 1.0})["report"] == {"macro_f1": 0.9}
  # A report of many classes is large: a checkpoint has one.
  saved = history.progress({}, {}).evaluations
  assert [each.get("report") for each in saved] == [None, {"macro_f1": 0.9}, None]

"""Charts of a sweep: where values are, labels that can be read, and what a map says."""

import re

import numpy as np
import pytest

from experiments.sweeps import charts
from experiments.sweeps.charts import Point


def _point(score, kind="done", curve=(), **values):
  return Point(kind, f"<{score}>", score, values, curve)


def _circles(svg):
  return [
    (float(x), float(y))
    for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
  ]


def _labels(svg):
  """Places and texts of an axis's labels, from left to right."""
  found = re.findall(
    r'<text x="([\d.]+)" y="252.0" text-anchor="middle"[^>]*>([^<]+)<', svg
  )
  return [(float(x), text) for x, text in found]


@pytest.mark.parametrize(
  ("values", "logarithmic"),
  [
    ((5e-4, 1e-3, 2e-3, 4e-3), True),
    ((2, 4, 8, 16), True),
    ((1e-4, 3e-2), True),
    ((1, 2, 3, 4), False),
    ((0.0, 0.1, 1.0), False),
    ((0.1, 0.2), False),
    ((1e-4, 3e-4, 1e-3, 3e-3), True),
    ((0.01, 0.03, 0.05, 0.08, 0.1), False),
  ],
)
def test_geometric_values_have_a_logarithmic_axis(values, logarithmic):
  points = [_point(0.5 + i / 10, x=x) for i, x in enumerate(values)]
  places = [x for x, _ in _circles(charts.by_field("x", "accuracy", points))]
  scale = np.log if logarithmic else np.asarray
  want = scale(np.array(values, float))
  unit = lambda x: (np.array(x) - x[0]) / (x[-1] - x[0])
  np.testing.assert_allclose(unit(places), unit(want), atol=2e-3)
  assert next(text for _, text in _labels(charts.by_field("x", "a", points))) == (
    f"{values[0]:.3g}"
  )


@pytest.mark.parametrize("count", [3, 8, 9, 64])
def test_labels_of_an_axis_do_not_overlap(count):
  rng = np.random.default_rng(count)
  for draw in (lambda: 10 ** rng.uniform(-5, -1), lambda: rng.uniform(0.1, 0.3)):
    points = [_point(float(rng.uniform()), x=float(draw())) for _ in range(count)]
    labels = _labels(charts.by_field("x", "accuracy", points))
    assert len(labels) > 1
    places = [place for place, _ in labels]
    assert min(np.diff(places)) >= 44
    assert all(len(text) <= 8 for _, text in labels)


def test_names_are_in_order_and_one_value_has_a_place():
  points = [_point(0.5, x=name) for name in ("lora", "dora")]
  svg = charts.by_field("x", "accuracy", points)
  assert [text for _, text in _labels(svg)] == ["lora", "dora"]
  assert len(_circles(charts.by_field("x", "accuracy", [_point(0.5, x=3)]))) == 1
  assert charts.by_field("x", "accuracy", [_point(None, x=3)]) == ""


def test_a_map_has_each_pairs_best_score_and_is_darkest_at_the_best():
  points = [
    _point(0.1 * a + 0.01 * b + seed, x=a, y=b)
    for a in (1, 2)
    for b in (3, 4, 5)
    for seed in (0.0, 0.001)
  ]
  svg = charts.interaction(("x", "y"), "accuracy", points, maximize=True)
  assert svg.count("<rect") == 6
  assert ">0.251</text>" in svg
  fills = dict(re.findall(r'fill="(rgb[^"]+)" stroke="#fff"><title>&lt;([\d.]+)', svg))
  darkest = min(fills, key=lambda rgb: int(rgb[4:].split(",")[0]))
  assert fills[darkest].startswith("0.251")
  least = charts.interaction(("x", "y"), "eval_loss", points, maximize=False)
  assert ">0.13</text>" in least


def test_many_values_make_a_map_of_points():
  points = [_point(i / 40, x=0.001 * (i + 1), y=i % 13) for i in range(40)]
  svg = charts.interaction(("x", "y"), "accuracy", points, maximize=True)
  assert svg.count("<circle") == 40
  assert "<rect" not in svg


def test_curves_end_where_their_trials_did():
  long, short = [(s, s / 100) for s in (10, 50, 100)], [(10, 0.05)]
  points = [_point(1.0, "best", long), _point(0.05, "pruned", short)]
  svg = charts.curves("accuracy", points)
  assert svg.count("<polyline") == 2
  ends = _circles(svg)
  assert ends[-1][0] > ends[0][0]  # The best is drawn last, over the others.
  assert charts.curves("accuracy", [_point(1.0)]) == ""
  assert "&lt;1.0&gt;" in svg

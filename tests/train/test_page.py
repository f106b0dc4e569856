"""report.html of a run, as a person's browser takes it."""

import json
import math
import sys
from html.parser import HTMLParser

import pytest

from lorax_flax.train.logs import chart
from lorax_flax.train.logs.page import About, render
from tests.train import toy

NASTY = "<script>alert('a & b')</script>"
LINES = [
  {"step": 2, "epoch": 0.5, "train/loss": 0.9, "train/learning_rate": 1e-3},
  {"step": 4, "epoch": 1.0, "train/loss": 0.5, "train/learning_rate": 5e-4},
  {"step": 4, "epoch": 1.0, "eval/loss": 0.6, f"eval/{NASTY}": 0.25},
  {"step": 8, "epoch": 2.0, "eval/loss": None, f"eval/{NASTY}": 0.75},
]
RESULT = {
  "accuracy": 0.75,
  "primary_metric": "accuracy",
  "best_step": 8,
  "steps": 8,
  "examples_evaluated": 1234,
  "trained_parameters": 4321,
  "seconds": {"steps": 61.0},
  "skipped_steps": 0,
  "tokens_per_second": 5678.9,
  "adapter": NASTY,
  "report": {
    "classes": {
      NASTY: {"precision": 0.5, "recall": 0.125, "f1": 0.2, "support": 8},
      "good": {"precision": 1.0, "recall": 0.5, "f1": 0.6667, "support": 4},
    },
    "confusion": {"labels": [NASTY, "good"], "rows": [[1, 7], [2, 2]]},
    "macro_f1": 0.4333,
  },
}
ABOUT = About(
  f"own data, {NASTY}",
  {"Base": {"name": NASTY}},
  {"train": {"steps": 8}, "model": {"path": NASTY}},
  {"Load": f"read({NASTY!r})"},
)


class Page(HTMLParser):
  """A page's elements, its text, and its tables as lines of cells."""

  EMPTY = ("meta", "circle", "polyline")

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.text, self.tables = [], [], "", []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.EMPTY:
      self.open.append(tag)
    if tag == "table":
      self.tables.append([])
    elif tag == "tr":
      self.tables[-1].append([])
    elif tag in ("th", "td"):
      self.tables[-1][-1].append("")

  def handle_endtag(self, tag):
    if tag not in self.EMPTY:
      assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data
    if self.open and self.open[-1] in ("th", "td"):
      self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def page():
  return Page(render(ABOUT, LINES, 8, "Finished.", RESULT))


def test_no_text_of_a_user_becomes_markup(page):
  names = {tag for tag, _ in page.tags}
  assert not names & {"script", "link", "img", "iframe", "object"}
  assert page.text.count(NASTY) >= 7
  attributes = {name for _, attrs in page.tags for name in attrs}
  assert not attributes & {"src", "href", "onclick", "onload"}


def test_a_reader_that_hears_the_page_finds_its_way(page):
  tags = dict(page.tags)
  assert tags["html"]["lang"] == "en"
  assert (
    "width=device-width"
    in dict(
      attrs.values() for tag, attrs in page.tags if tag == "meta" and "name" in attrs
    )["viewport"]
  )
  assert [tag for tag, _ in page.tags if tag in ("h1", "main")] == ["main", "h1"]
  assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
  pictures = [attrs for tag, attrs in page.tags if tag == "svg"]
  assert len(pictures) == 3
  assert all(x["role"] == "img" and "by step" in x["aria-label"] for x in pictures)


def test_each_evaluation_is_a_line_and_the_best_one_is_marked(page):
  [table] = [t for t in page.tables if t[0][0] == "step"]
  assert table == [
    ["step", "epoch", "loss", NASTY],
    ["4", "1.00", "0.6000", "0.2500"],
    ["8", "2.00", "–", "0.7500"],
  ]
  marked = [attrs for tag, attrs in page.tags if tag == "tr" and attrs]
  assert marked == [{"class": "best"}]


def test_the_scores_of_each_class_and_the_confusion_between_them(page):
  scores, confusion = (
    next(t for t in page.tables if t[0][0] == name) for name in ("class", "true class")
  )
  assert scores[0] == ["class", "precision", "recall", "f1", "support"]
  assert scores[1] == [NASTY, "0.5000", "0.1250", "0.2000", "8"]
  assert confusion == [
    ["true class", NASTY, "good"],
    [NASTY, "1", "7"],
    ["good", "2", "2"],
  ]


def test_the_page_says_what_the_run_was_and_how_to_use_it(page):
  lines = [line for table in page.tables for line in table]
  for line in (
    ["best accuracy", "0.7500"],
    ["at step", "8 of 8"],
    ["trained parameters", "4,321"],
    ["tokens per second", "5,679"],
    ["train.steps", "8"],
    ["model.path", NASTY],
  ):
    assert line in lines
  assert f"read({NASTY!r})" in page.text


def test_answers_are_side_by_side_and_by_step():
  def line(step, answer):
    return {"step": step, "prompt": NASTY, "expected": "e", "answer": answer}

  samples = [line(0, "a\n b"), line(0, "x"), line(4, "c"), line(4, "y")]
  page = Page(render(ABOUT, LINES, 8, "Finished.", RESULT, samples))
  [sides] = [t for t in page.tables if t[0][0] == "prompt"]
  assert sides == [
    ["prompt", "expected", "before training", "after step 4"],
    [NASTY, "e", "a\n b", "c"],
    [NASTY, "e", "x", "y"],
  ]
  samples += [line(8, NASTY), line(8, "z")]
  page = Page(render(ABOUT, LINES, 8, "Finished.", RESULT, samples))
  assert [
    ["step", "answer 1", "answer 2"],
    ["0", "a\n b", "x"],
    ["4", "c", "y"],
    ["8", NASTY, "z"],
  ] in page.tables
  assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
  names = {tag for tag, _ in page.tags}
  assert "script" not in names


def test_a_run_under_way_has_a_page_without_a_result():
  page = Page(render(ABOUT, LINES[:2], 8, "Under way: 4 of 8 steps are done."))
  assert "Under way: 4 of 8 steps are done." in page.text
  assert "Load" not in page.text
  assert "best accuracy" not in page.text


@pytest.mark.parametrize("values", [[], [None], [float("inf"), float("nan")]])
def test_nothing_finite_is_no_chart(values):
  assert chart.svg("loss", {"train/loss": list(enumerate(values))}) == ""


@pytest.mark.parametrize(
  "values",
  [
    *([0.0], [-1e-9, 1e-9], [1e299, -1e299], [5, 5, 5], [0, 5e-324], [5e-324]),
    *([0.1, math.nextafter(0.1, 1)], [2, sys.float_info.max], range(100_000)),
  ],
)
def test_a_chart_keeps_within_its_frame_and_to_a_size(values):
  svg = chart.svg("loss", {"train/loss": list(enumerate(values))})
  assert len(svg) < 20_000
  box = [float(x) for x in svg.split('viewBox="')[1].split('"')[0].split()]
  last = svg.split('<polyline points="')[-1].split('"')[0]
  for point in last.split():
    x, y = map(float, point.split(","))
    assert 0 <= x <= box[2]
    assert 0 <= y <= box[3]


def test_the_report_is_there_from_the_first_evaluation_on(tmp_path):
  class Stopped(Exception):
    pass

  def until_the_second(batches):
    class Batches:
      get_state, set_state = batches.get_state, batches.set_state
      count = 0

      def __next__(self):
        self.count += 1
        if self.count > 9:
          raise Stopped
        return next(batches)

    return Batches()

  with pytest.raises(Stopped):
    toy.fit(toy.with_batches(toy.job(tmp_path), until_the_second), tmp_path)
  page = Page((tmp_path / "report.html").read_text())
  assert "Under way: 8 of 24 steps are done." in page.text
  toy.fit(toy.job(tmp_path), tmp_path)
  page = Page((tmp_path / "report.html").read_text())
  assert "Finished." in page.text
  result = json.loads((tmp_path / "result.json").read_text())
  [table] = [t for t in page.tables if t[0][0] == "step"]
  assert [line[0] for line in table[1:]] == ["8", "16", "24"]
  assert ["at step", f"{result['best_step']} of 24"] in page.tables[0]

"""results.html of a sweep: curves, scores against fields, and the table; one file."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.sweeps import charts
from experiments.sweeps import outcomes as ends
from experiments.sweeps import table as sweep_table
from experiments.sweeps.charts import Point
from experiments.sweeps.outcomes import Outcome
from experiments.sweeps.trials import show
from lorax_flax import html_page
from lorax_flax.files import workdir
from lorax_flax.html_page import Link
from lorax_flax.train.logs.writer import lines_until
from lorax_flax.train.metrics import METRICS

# Fields of which each pair has a map.
_MOST_MAPPED = 3
# Trials whose answers are side by side.
_MOST_ANSWERING = 8
_LEGEND = {
  "best": "the best",
  "done": "done",
  "training": "under way",
  "pruned": "stopped early, at its last score",
  "failed": "diverged",
}


def page(outcomes: Sequence[Outcome], title: str, folder: Path) -> str:
  """The page so far; it needs no other file, and links to those of the trials.

  Args:
    folder: the sweep's, with a folder for each trial.
  """
  primary, best = ends.primary(outcomes), ends.best(outcomes)
  maximize = primary not in METRICS or METRICS[primary].better(1.0, 0.0)
  lines = {
    o.trial.name: lines_until(folder / o.trial.name / workdir.METRICS) for o in outcomes
  }
  ordered = _ordered(outcomes, maximize)
  points = [_point(o, best, primary, lines[o.trial.name]) for o in ordered]
  kinds = [point.kind for point in points]
  over = sum(o.over for o in outcomes)
  said = [f"{over} of {len(outcomes)} trials are over"]
  for kind in ("pruned", "failed"):
    if count := kinds.count(kind):
      said.append(f"{count} {_LEGEND[kind].split(',')[0]}")
  parts = [html_page.paragraph(f"{', '.join(said)}.")]
  if best is not None and best.score is not None:
    found = f"{best.score:.3g}, {best.trial.name} ({best.trial})"
    parts.append(html_page.paragraph(f"Best {primary}: {found}"))
  losses = [
    _with_curve(point, _series(lines[o.trial.name], "train/loss"))
    for point, o in zip(points, ordered, strict=True)
  ]
  named = _varied(outcomes)
  figures = [
    charts.curves("training loss", losses),
    charts.curves(primary, points),
    *(charts.by_field(name, primary, points) for name in named or ["seed"]),
    *(
      charts.interaction(pair, primary, points, maximize)
      for pair in itertools.combinations(named[:_MOST_MAPPED], 2)
    ),
  ]
  if shown := [f"<figure>{figure}</figure>" for figure in figures if figure]:
    legend = ", ".join(
      f'<b style="color:{charts.COLORS[kind]}">{text}</b>'
      for kind, text in _LEGEND.items()
      if kind in kinds
    )
    parts.append(html_page.section("Curves and scores", f"<p>{legend}</p>", *shown))
  if answers := _answers([o.trial.name for o in ordered], folder):
    parts.append(html_page.section("Answers", *answers))
  rows = [_row(o, lines[o.trial.name], primary, folder / o.trial.name) for o in ordered]
  header = ["trial", primary, "status", *sweep_table.fields(outcomes)]
  others = list(dict.fromkeys(name for o in outcomes for name in o.metrics))
  others = [name for name in others if name != primary]
  header += [*others, "best step", "settings", "reason"]
  table = [
    [
      *row,
      *(_cell(o.metrics.get(name)) for name in others),
      *_ending(o, folder / o.trial.name),
    ]
    for o, row in zip(ordered, rows, strict=True)
  ]
  parts.append(html_page.section("Trials", html_page.table(header, table, kinds)))
  if any(median.count > 1 and median.done for median in sweep_table.medians(outcomes)):
    parts.append(html_page.section("Medians over seeds", _medians(outcomes)))
  return html_page.page(title, "\n".join(parts))


def _answers(names: Sequence[str], folder: Path) -> list[str]:
  """A table for each prompt: the trials' answers side by side, by step.

  Args:
    names: of the trials, the best first; the first that answer are shown.
  """
  found: dict[str, Sequence[Mapping[str, Any]]] = {}
  for name in names:
    if lines := lines_until(folder / name / workdir.SAMPLES):
      found[name] = lines
  shown = [*found][:_MOST_ANSWERING]
  prompts: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
  for name in shown:
    for line in found[name]:
      steps = prompts.setdefault((line["prompt"], line["expected"]), {})
      steps.setdefault(line["step"], {})[name] = line["answer"]
  parts = []
  for (prompt, expected), steps in prompts.items():
    asked = html_page.facts([("prompt", prompt), ("expected", expected)])
    cells = [
      (f"{step:,}", *(answers.get(name, "") for name in shown))
      for step, answers in sorted(steps.items())
    ]
    parts += [asked, html_page.facts(cells, ["step", *shown])]
  if len(found) > len(shown):
    text = f"Of the {len(found)} trials that answer, the best {len(shown)}."
    parts.append(html_page.paragraph(text))
  return parts


def _row(
  outcome: Outcome, lines: Sequence[Mapping[str, Any]], primary: str, folder: Path
) -> list[Any]:
  """The start of a trial's line: its name, score, status and fields."""
  name, report = outcome.trial.name, folder / workdir.REPORT
  status = sweep_table.status(outcome)
  if not outcome.over and lines:
    status = f"at step {lines[-1]['step']}"
  return [
    Link(name, f"{name}/{workdir.REPORT}") if report.exists() else name,
    _cell(_score(outcome, primary, lines)),
    status,
    *map(_cell, outcome.trial.fields.values()),
  ]


def _ending(outcome: Outcome, folder: Path) -> list[Any]:
  """The end of a trial's line: best step, settings, reason."""
  name = outcome.trial.name
  there = (folder / workdir.CONFIG).exists()
  why = outcome.failed or outcome.pruned or {}
  return [
    _cell((outcome.result or {}).get("best_step")),
    Link(workdir.CONFIG, f"{name}/{workdir.CONFIG}") if there else "",
    why.get("reason", ""),
  ]


def _cell(value: Any) -> str:
  """A value in three digits."""
  if value is None or value == "":
    return ""
  return f"{value:.3g}" if isinstance(value, float) else show(value)


def _medians(outcomes: Sequence[Outcome]) -> str:
  best = sweep_table.best_median(outcomes)
  found = [m for m in sweep_table.medians(outcomes) if m.done]
  lines = [[*map(_cell, (*m.changes.values(), *m.cells))] for m in found]
  kinds = ["best" if m == best else "" for m in found]
  header = [*found[0].changes, "median", "spread", "seeds"]
  return html_page.table(header, lines, kinds)


def _ordered(outcomes: Sequence[Outcome], maximize: bool) -> list[Outcome]:
  """The best first; then what was stopped, the later the better; then the rest."""
  sign = -1.0 if maximize else 1.0

  def key(outcome: Outcome) -> tuple:
    if outcome.score is not None:
      return 0, 0, sign * outcome.score
    if outcome.scores:
      step, score = [*outcome.scores.items()][-1]
      return 1, -step, sign * score
    return 2 + (outcome.failed is not None), 0, 0.0

  return sorted(outcomes, key=key)


def _score(
  outcome: Outcome, primary: str, lines: Sequence[Mapping[str, Any]]
) -> float | None:
  """The result's, else the last one that there is."""
  if outcome.score is not None:
    return outcome.score
  found = _scores(outcome, primary, lines)
  return found[-1][1] if found else None


def _scores(
  outcome: Outcome, primary: str, lines: Sequence[Mapping[str, Any]]
) -> list[tuple[float, float]]:
  """The primary metric by step: of evaluations, and of samples between them."""
  metric = f"eval/{'loss' if primary == 'eval_loss' else primary}"
  found = {float(step): score for step, score in outcome.scores.items()}
  return sorted((found | dict(_series(lines, metric))).items())


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
  return [(x["step"], x[name]) for x in lines if x.get(name) is not None]


def _point(
  outcome: Outcome,
  best: Outcome | None,
  primary: str,
  lines: Sequence[Mapping[str, Any]],
) -> Point:
  kind = "training"
  if outcome is best:
    kind = "best"
  elif outcome.over:
    states = {"done": outcome.result, "pruned": outcome.pruned}
    kind = next((name for name, x in states.items() if x is not None), "failed")
  score = None if outcome.failed else _score(outcome, primary, lines)
  about = f"{outcome.trial.name}: {outcome.trial}; {primary} {_cell(score) or 'none'}"
  curve = _scores(outcome, primary, lines)
  return Point(kind, about, score, dict(outcome.trial.fields), curve)


def _with_curve(point: Point, curve: Sequence[tuple[float, float]]) -> Point:
  return Point(point.kind, point.about, point.score, point.values, curve)


def _varied(outcomes: Sequence[Outcome]) -> list[str]:
  """The fields that take several values; the seed is not one."""
  return [
    name
    for name in sweep_table.fields(outcomes)
    if name != "seed" and len({show(o.trial.fields[name]) for o in outcomes}) > 1
  ]

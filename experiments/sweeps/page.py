"""results.html of a sweep: the score against each field, and the table; one file."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from experiments.sweeps import outcomes as ends
from experiments.sweeps import table as sweep_table
from experiments.sweeps.outcomes import Outcome
from experiments.sweeps.trials import show
from lorax_flax import html_page


def page(outcomes: Sequence[Outcome], title: str) -> str:
  """The whole page; it needs no other file."""
  best = ends.best(outcomes)
  primary = ends.primary(outcomes)
  parts = []
  if best is not None:
    said = f"{best.score:.4f}, {best.trial.name} ({best.trial})"
    parts.append(html_page.paragraph(f"Best {primary}: {said}"))
    parts.append(_plots(outcomes, best, primary))
  if any(median.count > 1 for median in sweep_table.medians(outcomes)):
    parts.append(html_page.section("Medians over seeds", _medians(outcomes)))
  header, lines = sweep_table.rows(outcomes)
  kinds = [
    "best" if o is best else "failed" if o.failed is not None else "" for o in outcomes
  ]
  parts.append(html_page.section("Trials", _table(header, lines, kinds)))
  return html_page.page(title, "\n".join(parts))


def _medians(outcomes: Sequence[Outcome]) -> str:
  found, best = sweep_table.medians(outcomes), sweep_table.best_median(outcomes)
  lines = [[*m.changes.values(), *m.cells] for m in found]
  kinds = ["best" if m == best else "" for m in found]
  return _table([*found[0].changes, "median", "spread", "seeds"], lines, kinds)


def _table(
  header: Sequence[str], lines: Sequence[Sequence[Any]], kinds: Sequence[str]
) -> str:
  return html_page.table(header, [[show(x) for x in line] for line in lines], kinds)


def _plots(outcomes: Sequence[Outcome], best: Outcome, primary: str) -> str:
  """A panel for each field that takes several values; the seed is not one."""
  named = [
    name
    for name in sweep_table.fields(outcomes)
    if name != "seed" and len({show(o.trial.fields[name]) for o in outcomes}) > 1
  ] or ["seed"]
  figure = Figure(figsize=(4.5 * len(named), 3.8), layout="constrained")
  FigureCanvasSVG(figure)
  for place, name in enumerate(named, 1):
    axes = figure.add_subplot(1, len(named), place)
    axes.set_xlabel(name)
    axes.set_ylabel(primary)
    axes.grid(alpha=0.3)
    done = [o for o in outcomes if o.score is not None]
    values = [o.trial.fields[name] for o in outcomes]
    place_of = _places(axes, values)
    axes.plot(
      [place_of(o.trial.fields[name]) for o in done],
      [o.score for o in done if o.score is not None],
      "o",
      alpha=0.6,
      label="trial",
    )
    if best.score is not None:
      at = place_of(best.trial.fields[name])
      axes.plot([at], [best.score], "*", markersize=16, label="best")
    for o in outcomes:
      if o.failed is not None:
        axes.axvline(place_of(o.trial.fields[name]), color="#a33", ls=":", lw=1)
    axes.legend(frameon=False)
  out = io.StringIO()
  # The same page each time: no date, and names of parts that do not vary.
  with mpl.rc_context({"svg.hashsalt": "sweep"}):
    figure.savefig(out, format="svg", metadata={"Date": None})
  text = out.getvalue()
  return text[text.index("<svg") :]


def _places(axes, values: Sequence[Any]):
  """Sets the axis up for these values; returns where on it each lies."""
  numbers = [x for x in values if isinstance(x, int | float) and x is not True]
  if len(numbers) < len(values) or any(isinstance(x, bool) for x in values):
    names = list(dict.fromkeys(map(show, values)))
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    return lambda value: names.index(show(value))
  if min(numbers) > 0 and max(numbers) >= 10 * min(numbers):
    axes.set_xscale("log")
  return lambda value: value

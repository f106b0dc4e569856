"""Charts of a sweep as SVG: scores by field, curves of all trials, maps of two fields.

Drawn by hand as a run's charts are: the page is written anew at each evaluation.
"""

import html
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.sweeps.trials import show

_WIDTH, _HEIGHT = 420, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 30, 44
# Values of each of two fields up to which a map has a cell for each pair.
_MOST_CELLS = 10
_LIGHT, _DARK = (253, 236, 208), (11, 83, 148)


class _Side(NamedTuple):
  """Length of an axis, and the least distance of its labels, in pixels."""

  pixels: float
  apart: float


_X = _Side(_WIDTH - _LEFT - _RIGHT, 44)
_Y = _Side(_HEIGHT - _TOP - _BOTTOM, 18)
COLORS = {
  "best": "#166534",
  "done": "#0b5394",
  "training": "#7c2d92",
  "pruned": "#b45309",
  "failed": "#9f1239",
}


@dataclass(frozen=True)
class Point:
  """A trial in a chart.

  Attributes:
    kind: a key of `COLORS`.
    about: text that is shown where the mouse rests.
    score: None for one that has none; it has no place in most charts.
    values: its fields, by name.
    curve: (step, value), oldest first.
  """

  kind: str
  about: str
  score: float | None
  values: dict[str, Any]
  curve: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class _Axis:
  """An axis: the place of a value from 0 to 1, and labelled ticks."""

  at: Callable[[Any], float]
  ticks: Sequence[tuple[Any, str]]


def is_geometric(values: Sequence[float]) -> bool:
  """True for positive numbers whose ratios are all the same, or that crowd at 0."""
  numbers = sorted({*values})
  low, high = numbers[0], numbers[-1]
  if low <= 0 or len(numbers) < 3:
    return low > 0 and high >= 10 * low
  ratios = [b / a for a, b in itertools.pairwise(numbers)]
  crowded = statistics.median(numbers) < (low + high) / 3
  return max(ratios) < 1.05 * min(ratios) or (high >= 10 * low and crowded)


def _axis(values: Sequence[Any], side: _Side) -> _Axis:
  """The axis of a field's values; numbers have their distances, names are in order."""
  if any(isinstance(x, bool) or not isinstance(x, int | float) for x in values):
    return _named([*dict.fromkeys(map(show, values))], side)
  numbers = sorted({float(x) for x in values})
  scale = math.log10 if is_geometric(numbers) else float
  low, high = scale(numbers[0]), scale(numbers[-1])
  margin = (high - low) * 0.06 or abs(low) * 0.1 or 1.0
  low, high = low - margin, high + margin

  def at(value: float) -> float:
    return (scale(value) - low) / (high - low)

  many = len(numbers) > 8
  marks = _round_marks(low, high, scale is math.log10) if many else numbers
  return _Axis(at, _apart(((x, _digits(x)) for x in marks), at, side))


def _named(names: Sequence[str], side: _Side) -> _Axis:
  def at(value: Any) -> float:
    return (names.index(show(value)) + 0.5) / len(names)

  return _Axis(at, _apart(((x, x) for x in names), at, side))


def _apart(marks, at: Callable[[Any], float], side: _Side) -> list[tuple[Any, str]]:
  """The marks of which no label covers the one before."""
  kept: list[tuple[Any, str]] = []
  for value, label in marks:
    if not kept or (at(value) - at(kept[-1][0])) * side.pixels >= side.apart:
      kept.append((value, label))
  return kept


def _round_marks(low: float, high: float, logarithmic: bool) -> list[float]:
  """Round numbers between two bounds, which are logarithms where the axis is."""
  if logarithmic:
    decades = range(math.floor(low), math.ceil(high) + 1)
    marks = [m * 10.0**decade for decade in decades for m in (1, 2, 5)]
    return [x for x in marks if low <= math.log10(x) <= high]
  power = 10.0 ** math.floor(math.log10((high - low) / 4))
  step = next(m * power for m in (1, 2, 5, 10) if m * power * 5 >= high - low)
  return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _digits(value: float) -> str:
  return f"{value:.3g}"


def by_field(name: str, primary: str, points: Sequence[Point]) -> str:
  """The score of each trial against a field; those without a score are left out."""
  shown = [point for point in points if point.score is not None]
  if not shown:
    return ""
  x = _axis([point.values[name] for point in points], _X)
  y = _axis_of_scores([*map(_score, shown)])
  marks = [
    _mark(x.at(point.values[name]), y.at(_score(point)), point)
    for point in sorted(shown, key=lambda point: point.kind == "best")
  ]
  return _chart(f"{primary} by {name}", name, x, y, marks)


def curves(heading: str, points: Sequence[Point]) -> str:
  """The curves of all trials, each to where it ended."""
  shown = [point for point in points if point.curve]
  if not shown:
    return ""
  every = [pair for point in shown for pair in point.curve]
  steps, values = ([pair[i] for pair in every] for i in (0, 1))
  x = _linear(min(steps), max(steps), _X)
  y = _axis_of_scores(values)
  marks = []
  for point in sorted(shown, key=lambda point: point.kind == "best"):
    best, color = point.kind == "best", COLORS[point.kind]
    places = [_pixels(x.at(step), y.at(value)) for step, value in point.curve]
    joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    label = f"<title>{html.escape(point.about)}</title>"
    marks.append(
      f'<polyline points="{joined}" fill="none" stroke="{color}" '
      f'stroke-width="{2.5 if best else 1.2}" opacity="{1 if best else 0.55}">'
      f"{label}</polyline>"
    )
    last = point.curve[-1]
    marks.append(_mark(x.at(last[0]), y.at(last[1]), point))
  return _chart(heading, "step", x, y, marks)


def interaction(
  names: tuple[str, str], primary: str, points: Sequence[Point], maximize: bool
) -> str:
  """A map of two fields: the darker, the better; each pair's best score."""
  shown = [point for point in points if point.score is not None]
  if len(shown) < 2:
    return ""
  scores = [*map(_score, shown)]
  worst, best = (min(scores), max(scores)) if maximize else (max(scores), min(scores))

  def shade(score: float) -> tuple[str, str]:
    part = (score - worst) / (best - worst) if best != worst else 1.0
    part = part**2  # Most of the shades for the better ones.
    mixed = [round(a + (b - a) * part) for a, b in zip(_LIGHT, _DARK, strict=True)]
    return f"rgb({','.join(map(str, mixed))})", "#fff" if part > 0.5 else "#222"

  across, up = ([point.values[name] for point in points] for name in names)
  heading = f"{primary} by {names[0]} and {names[1]}"
  if all(len({*map(show, values)}) <= _MOST_CELLS for values in (across, up)):
    return _cells(heading, names, shown, (across, up), shade, maximize)
  x, y = _axis(across, _X), _axis(up, _Y)
  marks = []
  for point in sorted(shown, key=_score, reverse=not maximize):
    a, b = _pixels(x.at(point.values[names[0]]), y.at(point.values[names[1]]))
    marks.append(
      f'<circle cx="{a:.1f}" cy="{b:.1f}" r="9" fill="{shade(_score(point))[0]}" '
      f'stroke="#666"><title>{html.escape(point.about)}</title></circle>'
    )
  return _chart(heading, names[0], x, y, marks, names[1])


def _cells(
  heading: str,
  names: tuple[str, str],
  shown: Sequence[Point],
  values: tuple[Sequence[Any], Sequence[Any]],
  shade: Callable[[float], tuple[str, str]],
  maximize: bool,
) -> str:
  """The map where few values make a grid."""
  ordered = [[*dict.fromkeys(map(show, sorted(each, key=_order)))] for each in values]
  x, y = _named(ordered[0], _X), _named(ordered[1], _Y)
  width, height = _X.pixels / len(ordered[0]), _Y.pixels / len(ordered[1])
  found: dict[tuple[str, str], Point] = {}
  for point in sorted(shown, key=_score, reverse=not maximize):
    found[show(point.values[names[0]]), show(point.values[names[1]])] = point
  marks = []
  for (across, up), point in found.items():
    a, b = _pixels(x.at(across), y.at(up))
    fill, ink = shade(_score(point))
    marks.append(
      f'<rect x="{a - width / 2:.1f}" y="{b - height / 2:.1f}" width="{width:.1f}" '
      f'height="{height:.1f}" fill="{fill}" stroke="#fff"><title>'
      f"{html.escape(point.about)}</title></rect>"
    )
    if width >= 30:  # Wide enough for three digits.
      marks.append(_text(a, b + 4, _digits(_score(point)), "middle", ink))
  return _chart(heading, names[0], x, y, marks, names[1])


def _score(point: Point) -> float:
  assert point.score is not None
  return point.score


def _order(value: Any) -> tuple[bool, Any]:
  number = isinstance(value, int | float)
  return not number, value if number else str(value)


def _axis_of_scores(values: Sequence[float]) -> _Axis:
  low, high = min(values), max(values)
  margin = (high - low) * 0.06 or abs(low) * 0.1 or 1.0
  return _linear(low - margin, high + margin, _Y)


def _linear(low: float, high: float, side: _Side) -> _Axis:
  high = high if high > low else low + 1.0

  def at(value: Any) -> float:
    return (value - low) / (high - low)

  marks = ((x, _digits(x)) for x in _round_marks(low, high, False))
  return _Axis(at, _apart(marks, at, side))


def _pixels(x: float, y: float) -> tuple[float, float]:
  return _LEFT + x * _X.pixels, _HEIGHT - _BOTTOM - y * _Y.pixels


def _mark(x: float, y: float, point: Point) -> str:
  """A circle, hollow for a trial that did not reach its end."""
  a, b = _pixels(x, y)
  color, best = COLORS[point.kind], point.kind == "best"
  fill = color if point.kind in ("best", "done") else "#fff"
  return (
    f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{6 if best else 4}" fill="{fill}" '
    f'stroke="{color}" stroke-width="1.5" opacity="{1 if best else 0.8}">'
    f"<title>{html.escape(point.about)}</title></circle>"
  )


def _chart(
  heading: str, name: str, x: _Axis, y: _Axis, marks: Sequence[str], up: str = ""
) -> str:
  label = html.escape(heading)
  out = [
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" '
    f'aria-label="{label}" font-family="sans-serif" font-size="12" fill="#222">',
    _text(_LEFT, 16, heading, "start", "#222", ' font-weight="bold"'),
  ]
  for value, shown in x.ticks:
    a, b = _pixels(x.at(value), 0.0)
    out.append(_grid(a, b, a, _TOP))
    out.append(_text(a, b + 16, shown, "middle"))
  for value, shown in y.ticks:
    a, b = _pixels(0.0, y.at(value))
    out.append(_grid(a, b, _WIDTH - _RIGHT, b))
    out.append(_text(a - 6, b + 4, shown, "end"))
  out.append(_text(_LEFT + _X.pixels / 2, _HEIGHT - 8, name, "middle", "#555"))
  if up:
    turned = f' transform="rotate(-90 14 {_TOP + _Y.pixels / 2:.1f})"'
    out.append(_text(14, _TOP + _Y.pixels / 2, up, "middle", "#555", turned))
  return "\n".join([*out, *marks, "</svg>"])


def _grid(x1: float, y1: float, x2: float, y2: float) -> str:
  return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="#e2e2e2"/>'


def _text(
  x: float, y: float, text: str, anchor: str, color: str = "#222", more: str = ""
) -> str:
  return (
    f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}"{more}>'
    f"{html.escape(text)}</text>"
  )

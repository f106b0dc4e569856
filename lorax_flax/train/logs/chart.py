"""Line charts as SVG, inside a page: drawn in a moment, with text that is text."""

import html
import math
from collections.abc import Mapping, Sequence

Series = Mapping[str, Sequence[tuple[float, float]]]

_WIDTH, _HEIGHT = 480, 260  # of the plot with its axes, in pixels at full size
_LEFT, _RIGHT, _BOTTOM, _LINE = 64, 14, 30, 20
_COLORS = ("#0b5394", "#b45309", "#166534", "#7c2d92", "#9f1239", "#374151")
_DASHES = ("", "7 3", "2 3", "9 3 2 3")  # Lines differ on black and white paper too.
_MOST_POINTS = 400
_SMALLEST, _LARGEST = 1e-290, 1e300  # of which differences and ratios are floats too


def svg(heading: str, series: Series) -> str:
  """A chart of (step, value) by name; values that are not finite are left out.

  Returns:
    An `<svg>` with a title and a legend; "" where there is nothing to draw.
  """
  shown = {name: kept for name, points in series.items() if (kept := _kept(points))}
  if not shown:
    return ""
  top = _LINE * (len(shown) + 1) + 8
  right, bottom = _WIDTH - _RIGHT, top + _HEIGHT - _BOTTOM
  every = [point for points in shown.values() for point in points]
  xs, ys = _ticks([x for x, _ in every], 1.0), _ticks([y for _, y in every])

  def at(x: float, y: float) -> tuple[float, float]:
    across = (x - xs[0]) / (xs[-1] - xs[0])
    up = (y - ys[0]) / (ys[-1] - ys[0])
    return _LEFT + across * (right - _LEFT), bottom - up * (bottom - top)

  spans = [f"{n} from {p[0][1]:.4g} to {p[-1][1]:.4g}" for n, p in shown.items()]
  label = html.escape(f"{heading} by step: {'; '.join(spans)}")
  out = [
    f'<svg viewBox="0 0 {_WIDTH} {bottom + _BOTTOM}" width="{_WIDTH}" role="img" '
    f'aria-label="{label}" font-family="sans-serif" font-size="13" fill="#222">',
    f"<title>{label}</title>",
    _text(_LEFT, 16, heading, "start", ' font-weight="bold"'),
  ]
  for y in ys:
    _, place = at(xs[0], y)
    out.append(_line([(_LEFT, place), (right, place)], "#ddd", "", 1))
    out.append(_text(_LEFT - 6, place + 4, f"{y:.6g}", "end"))
  for x in xs:
    out.append(_text(at(x, ys[0])[0], bottom + 18, f"{x:.6g}", "middle"))
  for number, (name, points) in enumerate(shown.items()):
    color, dash = (each[number % len(each)] for each in (_COLORS, _DASHES))
    level = _LINE * (number + 1) + 12
    out.append(_line([(_LEFT, level), (_LEFT + 28, level)], color, dash, 2))
    out.append(_text(_LEFT + 36, level + 4, name, "start"))
    places = [at(*point) for point in points]
    out.append(_line(places, color, dash, 2))
    if len(points) <= _MOST_POINTS // 10:
      out += [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places
      ]
  return "\n".join([*out, "</svg>"])


def _kept(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """Points at equal distances, the last one among them."""
  finite = [p for p in points if p[1] is not None and abs(p[1]) < _LARGEST]
  step = -(-len(finite) // _MOST_POINTS) or 1
  return finite[::-1][::step][::-1]


def _ticks(values: Sequence[float], least: float = 0.0) -> list[float]:
  """Round numbers at equal distances, from below the values to above them.

  Args:
    least: smallest distance.
  """
  low, high = min(values), max(values)
  size = max(abs(low), abs(high))
  if high - low <= 1e-9 * size + _SMALLEST:
    half = size / 2 if size > _SMALLEST else 1.0
    low, high = low - half, high + half
  rough = max((high - low) / 4, least)
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [i * step for i in range(first, last + 1)]


def _line(
  points: Sequence[tuple[float, float]], color: str, dash: str, width: int
) -> str:
  places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
  dashed = f' stroke-dasharray="{dash}"' if dash else ""
  return (
    f'<polyline points="{places}" fill="none" stroke="{color}" '
    f'stroke-width="{width}"{dashed}/>'
  )


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
  return (
    f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>'
    f"{html.escape(text)}</text>"
  )

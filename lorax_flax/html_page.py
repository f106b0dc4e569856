"""HTML pages in one file: no script, nothing from elsewhere, all text escaped."""

import html
from collections.abc import Sequence
from typing import NamedTuple

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1em;
  max-width: 70em; color: #222; background: #fff; }
h1, h2, td, th, pre { overflow-wrap: anywhere; }
h1 { font-size: 1.6em; line-height: 1.2; }
h2 { font-size: 1.2em; margin: 1.6em 0 .4em; }
table { border-collapse: collapse; margin: .5em 0 1em; }
caption { text-align: left; color: #555; padding-bottom: .25em; }
th, td { padding: .25em .8em; text-align: right; vertical-align: top;
  border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, .text td { text-align: left; }
tbody th, .text th { font-weight: normal; }
.text th { min-width: 7em; color: #555; text-align: left; }
.text th, .text td { white-space: pre-wrap; }
tr.best { background: #e6f2e6; }
tr.best > * { font-weight: bold; }
tr.failed > * { color: #a33; }
tr.pruned > * { color: #666; }
.scroll { overflow-x: auto; }
.scroll td, .scroll thead th { overflow-wrap: normal; }
pre { background: #f4f4f4; padding: .6em .8em; white-space: pre-wrap;
  font-size: .85em; }
svg { max-width: 100%; height: auto; }
figure { display: inline-block; margin: 0 1em 1em 0; max-width: 100%; }
@media print { body { max-width: none; font-size: 10pt; padding: 0; }
  figure { width: 44%; } h2 { break-after: avoid; }
  pre, figure, tr { break-inside: avoid; }
  tr.best { outline: 1px solid #222; } }
"""


class Link(NamedTuple):
  """A cell that leads to another file."""

  text: str
  href: str


Cell = str | Link


def page(title: str, body: str) -> str:
  """A page; it needs no other file.

  Args:
    title: text of the heading and of the window.
    body: HTML below the heading.
  """
  name = html.escape(title)
  return (
    f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{name}</title><style>{_STYLE}</style></head>\n"
    f"<body><main>\n<h1>{name}</h1>\n{body}\n</main></body></html>\n"
  )


def section(heading: str, *parts: str) -> str:
  """A heading and the HTML below it."""
  return "\n".join([f"<h2>{html.escape(heading)}</h2>", *parts])


def paragraph(text: str) -> str:
  return f"<p>{html.escape(text)}</p>"


def code(text: str) -> str:
  """A block of code."""
  return f"<pre><code>{html.escape(text)}</code></pre>"


def table(
  header: Sequence[str],
  lines: Sequence[Sequence[Cell]],
  kinds: Sequence[str] = (),
  caption: str = "",
) -> str:
  """A table of numbers, which scrolls by itself where it is wider than the page.

  Args:
    header: names of the columns.
    lines: cells; the first of each names its line.
    kinds: classes of the style, "best" or "failed", for each line; none by default.
    caption: a line above it.
  """
  label = html.escape(caption or header[0])
  return "\n".join(
    [
      f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>',
      *([f"<caption>{html.escape(caption)}</caption>"] if caption else ()),
      _head(header),
      *_body(lines, kinds or [""] * len(lines)),
      "</table></div>",
    ]
  )


def facts(values: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
  """A table of names and texts, as wide as the page at most.

  Args:
    values: cells; the first of each names its line.
    header: names of the columns; none by default.
  """
  return "\n".join(
    [
      '<table class="text">',
      *([_head(header)] if header else ()),
      *_body(values, [""] * len(values)),
      "</table>",
    ]
  )


def _head(header: Sequence[str]) -> str:
  cells = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
  return f"<thead><tr>{cells}</tr></thead>"


def _body(lines: Sequence[Sequence[Cell]], kinds: Sequence[str]) -> list[str]:
  out = ["<tbody>"]
  for (name, *rest), kind in zip(lines, kinds, strict=True):
    cells = "".join(f"<td>{_cell(value)}</td>" for value in rest)
    mark = f' class="{kind}"' if kind else ""
    out.append(f'<tr{mark}><th scope="row">{_cell(name)}</th>{cells}</tr>')
  return [*out, "</tbody>"]


def _cell(value: Cell) -> str:
  if isinstance(value, Link):
    return f'<a href="{html.escape(value.href)}">{html.escape(value.text)}</a>'
  return html.escape(value)

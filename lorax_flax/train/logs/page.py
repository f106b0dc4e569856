"""report.html of a run: what it is, how it went, and what to do with the result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorax_flax import html_page
from lorax_flax.train.logs import chart, curves, memory
from lorax_flax.train.logs.progress_bar import duration


@dataclass(frozen=True)
class About:
  """Description of a run for people, made before it trains.

  Attributes:
    title: heading of its report and of its curves.
    facts: texts by name, by section: {"Model": {"base": "minilm"}}.
    settings: its config, nested.
    usage: code that loads, merges and serves what it makes, by heading.
  """

  title: str = ""
  facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
  settings: Mapping[str, Any] = field(default_factory=dict)
  usage: Mapping[str, str] = field(default_factory=dict)


def render(
  about: About,
  lines: Sequence[Mapping[str, Any]],
  best_step: int,
  status: str,
  result: Mapping[str, Any] | None = None,
  samples: Sequence[Mapping[str, Any]] = (),
) -> str:
  """The page of a run that is under way, or of one that is over.

  Args:
    lines: of metrics.jsonl.
    best_step: step of the best evaluation, if there is one.
    status: a sentence on how far it is.
    result: content of result.json, once there is one.
    samples: lines of samples.jsonl.
  """
  parts = [html_page.paragraph(status)]
  if result is not None:
    parts.append(html_page.section("Result", html_page.facts(_result(result))))
  if charts := [chart.svg(name, series) for name, series in curves.panels(lines)]:
    figures = [f"<figure>{each}</figure>" for each in charts if each]
    parts.append(html_page.section("Curves", *figures))
  if evaluations := _evaluations(lines, best_step):
    parts.append(html_page.section("Evaluations", evaluations))
  if samples:
    parts.append(html_page.section("Answers", *_answers(samples)))
  if result is not None and (report := result.get("report")):
    parts.append(html_page.section("Classes", *_classes(report)))
  if result is not None:
    parts += [
      html_page.section(heading, html_page.code(text))
      for heading, text in about.usage.items()
    ]
  parts += [
    html_page.section(heading, html_page.facts(list(values.items())))
    for heading, values in about.facts.items()
  ]
  if about.settings:
    settings = html_page.facts(list(flat(about.settings)))
    parts.append(html_page.section("Settings", settings))
  return html_page.page(about.title, "\n".join(parts))


def _result(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  primary = result["primary_metric"]
  units = [name for name in result if name.endswith("_per_second")]
  found = {
    f"best {primary}": show(result.get(primary)),
    "at step": f"{result['best_step']:,} of {result['steps']:,}",
    "examples evaluated": f"{result['examples_evaluated']:,}",
    "trained parameters": f"{result['trained_parameters']:,}",
    "time": ", ".join(f"{n} {duration(s)}" for n, s in result["seconds"].items()),
    **{name.replace("_", " "): f"{result[name]:,.0f}" for name in units},
    "peak memory": memory.show(memory.peak()),
    "skipped steps": f"{result['skipped_steps']:,}",
    **{name: result[name] for name in ("adapter", "model") if name in result},
  }
  return list(found.items())


def _evaluations(lines: Sequence[Mapping[str, Any]], best_step: int) -> str:
  found = [line for line in lines if any(name.startswith("eval/") for name in line)]
  if not found:
    return ""
  names = [name for name in found[0] if name.startswith("eval/")]
  header = ["step", "epoch", *(name.removeprefix("eval/") for name in names)]
  rows = [
    [f"{line['step']:,}", f"{line['epoch']:.2f}", *(show(line[n]) for n in names)]
    for line in found
  ]
  kinds = ["best" if line["step"] == best_step else "" for line in found]
  return html_page.table(header, rows, kinds, "The best one is marked.")


def _answers(lines: Sequence[Mapping[str, Any]]) -> list[str]:
  """Tables of answers before and after training, and by step."""
  steps: dict[int, list[Mapping[str, Any]]] = {}
  for line in lines:
    steps.setdefault(line["step"], []).append(line)
  name = lambda step: f"after step {step:,}" if step else "before training"
  sides = [min(steps), max(steps)] if len(steps) > 1 else list(steps)
  header = ["prompt", "expected", *map(name, sides)]
  rows = [
    (line["prompt"], line["expected"], *(steps[side][i]["answer"] for side in sides))
    for i, line in enumerate(steps[sides[0]])
  ]
  tables = [html_page.facts(rows, header)]
  if len(steps) > 2:
    header = ["step", *(f"answer {i}" for i in range(1, len(rows) + 1))]
    each = [(f"{n:,}", *(x["answer"] for x in found)) for n, found in steps.items()]
    tables.append(html_page.facts(each, header))
  return tables


def _classes(report: Mapping[str, Any]) -> list[str]:
  """Tables of a report as of `lorax_flax.train.report`."""
  classes: Mapping[str, Mapping[str, Any]] = report.get("classes", {})
  columns = list(dict.fromkeys(name for scores in classes.values() for name in scores))
  tables = []
  if columns:
    rows = [[n, *(show(s.get(c)) for c in columns)] for n, s in classes.items()]
    tables.append(html_page.table(["class", *columns], rows))
  if confusion := report.get("confusion"):
    names = confusion["labels"]
    rows = [
      [n, *map(show, row)] for n, row in zip(names, confusion["rows"], strict=True)
    ]
    note = (
      "Number of examples: a line for each true class, a column for each predicted."
    )
    tables.append(html_page.table(["true class", *names], rows, caption=note))
  return tables


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
  """Nested settings as (dotted name, text)."""
  found: list[tuple[str, str]] = []
  for name, value in settings.items():
    if isinstance(value, Mapping) and value:
      found += flat(value, f"{prefix}{name}.")
    else:
      found.append((f"{prefix}{name}", str(value)))
  return found


def show(value: Any) -> str:
  """A score or a count for a person; a dash where it is not finite."""
  if value is None:
    return "–"
  return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"

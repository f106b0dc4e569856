"""A step's costs as a table."""

from typing import Any

from rich import console as rich_console
from rich import table as rich_table

from launch.costs import Costs
from launch.topology import GIB, Topology


def table(title: str, costs: Costs, topology: Topology) -> rich_table.Table:
  """One step on one chip."""
  made = rich_table.Table(title=title, title_justify="left")
  made.add_column("per chip")
  made.add_column("", justify="right")
  made.add_column("")
  for row in (*_memory(costs, topology), None, *_time(costs, topology)):
    if row is None:
      made.add_section()
    else:
      made.add_row(*row)
  return made


def _memory(c: Costs, topology: Topology) -> list[tuple[str, str, str]]:
  a, hbm = c.arguments, topology.chip.hbm
  fits = f"fits: {c.peak / hbm:.0%} of {size(hbm)}"
  if c.peak > hbm:
    fits = f"does NOT fit into {size(hbm)}"
  return [
    ("weights", size(a.weights), "frozen"),
    ("adapter", size(a.adapter), "trained, float32"),
    ("optimiser", size(a.optimizer), ""),
    ("batch", size(a.batch), ""),
    ("padding", size(c.padding), "of the above, to whole tiles"),
    ("activations", size(c.temporaries), "temporaries: all that a step forgets"),
    ("program", size(c.code + c.results), "and results in no argument's place"),
    ("peak HBM", size(c.peak), fits),
  ]


def _time(c: Costs, topology: Topology) -> list[tuple[str, str, str]]:
  chip = topology.chip
  again = c.flops / c.useful - 1
  rows = [
    (
      "FLOPs",
      f"{c.flops:.3g}",
      f"{c.compute * 1e3:,.1f} ms at {chip.flops / 1e12:,.0f} TFLOP/s;"
      f" {again:.0%} more than needed",
    ),
    (
      "HBM traffic",
      size(c.hbm),
      f"{c.memory * 1e3:,.1f} ms at {chip.hbm_bandwidth / 1e9:,.0f} GB/s",
    ),
  ]
  for kind in sorted(c.sent, key=lambda k: -c.sent[k]):
    rows.append((kind, size(c.sent[kind]), f"sent, in {c.runs[kind]:,} runs"))
  rows += [
    (
      "interconnect",
      size(sum(c.sent.values())),
      f"{c.network * 1e3:,.1f} ms at {chip.link / 1e9:,.0f} GB/s a link and direction",
    ),
    ("step, at the least", f"{c.seconds * 1e3:,.1f} ms", f"bound by {c.bound}"),
    ("utilisation (MFU)", f"{c.utilization:.1%}", "of the peak, at the most"),
  ]
  return rows


def size(count: float) -> str:
  """Bytes in a unit that suits them."""
  for unit, name in ((GIB, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")):
    if count >= unit:
      return f"{count / unit:,.2f} {name}"
  return f"{count:,.0f} B"


def show(*parts: Any) -> None:
  """Prints tables and lines."""
  console = rich_console.Console(highlight=False, soft_wrap=True)
  for part in parts:
    console.print(part, markup=False) if isinstance(part, str) else console.print(part)

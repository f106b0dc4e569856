"""A step's costs as a table."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from rich import console as rich_console
from rich import table as rich_table

from launch.costs import Costs, TooLarge, arguments
from launch.topology import GIB, Topology


def table(title: str, costs: Costs, job: Any, topology: Topology) -> rich_table.Table:
  """One step on one chip.

  Args:
    job: whose costs they are, for its batch.
  """
  made = rich_table.Table(title=title, title_justify="left")
  made.add_column("per chip")
  made.add_column("", justify="right")
  made.add_column("")
  for row in (*_memory(costs, topology), None, *_time(costs, job, topology)):
    if row is None:
      made.add_section()
    else:
      made.add_row(*row)
  return made


def too_large(title: str, job: Any, error: TooLarge) -> rich_table.Table:
  """What is known of a step that does not fit."""
  a = arguments(job)
  made = rich_table.Table(title=title, title_justify="left")
  made.add_column("per chip")
  made.add_column("", justify="right")
  for row in (
    ("weights", size(a.weights)),
    ("adapter", size(a.adapter)),
    ("optimiser", size(a.optimizer)),
    ("batch", size(a.batch)),
    ("the rest: activations, padding", size(max(0.0, error.used - a.total))),
    ("peak HBM", size(error.used)),
    ("the compiler has", size(error.available)),
  ):
    made.add_row(*row)
  return made


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
  """Shows that something is going on, on a terminal."""
  console = rich_console.Console(stderr=True)
  with console.status(what):
    yield


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


def _time(c: Costs, job: Any, topology: Topology) -> list[tuple[str, str, str]]:
  chip = topology.chip
  again = c.flops / c.useful - 1
  rows_BxT = job.batch["input_ids"].shape
  tokens = math.prod(rows_BxT)
  found = [
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
    found.append((kind, size(c.sent[kind]), f"sent, in {c.runs[kind]:,} runs"))
  found += [
    (
      "interconnect",
      size(sum(c.sent.values())),
      f"{c.network * 1e3:,.1f} ms at {chip.link / 1e9:,.0f} GB/s a link and direction",
    ),
    ("step, at the least", f"{c.seconds * 1e3:,.1f} ms", f"bound by {c.bound}"),
    ("utilisation (MFU)", f"{c.utilization:.1%}", "of the peak, at the most"),
    (
      "tokens/s",
      f"{tokens / c.seconds / topology.size:,.0f}",
      f"{rows_BxT[0]} × {rows_BxT[1]} a step, over {topology.size:,} chips",
    ),
  ]
  return found


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

"""Tables of a step's costs, and their units."""

import contextlib
from collections.abc import Iterator
from typing import Any

from rich import console as rich_console

from launch.dryrun.costs import Costs, TooLarge, arguments
from launch.dryrun.topology import GIB, Topology
from lorax_flax import text_table


def table(title: str, costs: Costs, job: Any, topology: Topology) -> str:
  """Costs of one step on one chip.

  Args:
    job: the step, whose batch the throughput counts.
  """
  times = _time(costs, job, topology) if topology.chip.timed else []
  rows = [*_memory(costs, topology), (), *_collectives(costs), *times]
  return text_table.render(("per chip", "", ""), rows, align="lrl", title=title)


def too_large(title: str, job: Any, error: TooLarge) -> str:
  """Memory by part of a step that does not fit."""
  a = arguments(job)
  rows = (
    ("weights", size(a.weights)),
    ("adapter", size(a.adapter)),
    ("optimiser", size(a.optimizer)),
    ("batch", size(a.batch)),
    ("the rest: activations, padding", size(max(0.0, error.used - a.total))),
    ("peak HBM", size(error.used)),
    ("the compiler has", size(error.available)),
  )
  return text_table.render(("per chip", ""), rows, align="lr", title=title)


@contextlib.contextmanager
def spinner(text: str) -> Iterator[None]:
  """Shows a spinner with a text while its block runs, on a terminal."""
  # On standard output: the compiler writes its own lines to standard error.
  with rich_console.Console().status(text):
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
    ("padding", size(c.padding), "of the above, to full tiles"),
    ("activations", size(c.temporaries), "temporaries of the step"),
    ("program", size(c.code + c.results), "and results not in place"),
    ("peak HBM", size(c.peak), fits),
  ]


def _collectives(c: Costs) -> list[tuple[str, str, str]]:
  return [
    (kind, size(c.sent[kind]), f"sent, {c.runs[kind]:,} runs")
    for kind in sorted(c.sent, key=lambda k: -c.sent[k])
  ]


def _time(c: Costs, job: Any, topology: Topology) -> list[tuple[str, str, str]]:
  chip = topology.chip
  recomputed = c.flops / c.useful - 1
  rows, length = job.batch["input_ids"].shape
  rate = rows * length / c.seconds / topology.size
  kernels = [f"{name} × {runs:,}" for name, runs in c.kernels.items()]
  return [
    ("attention", "kernel" if kernels else "products", ", ".join(kernels)),
    (
      "interconnect",
      size(sum(c.sent.values())),
      f"{time(c.network)} at {chip.link / 1e9:,.0f} GB/s a link",
    ),
    (
      "matmul FLOPs",
      f"{c.flops:.3g}",
      f"{time(c.compute)} at {chip.flops / 1e12:,.0f} TFLOP/s;"
      f" {recomputed:.0%} more than needed",
    ),
    (
      "HBM traffic",
      size(c.hbm),
      f"{time(c.memory)} at {chip.hbm_bandwidth / 1e9:,.0f} GB/s",
    ),
    ("step, by the roofline", time(c.seconds), f"bound by {c.bound}"),
    ("utilisation (MFU)", f"{c.utilization:.1%}", "of the peak"),
    ("tokens/s", f"{rate:,.0f}", f"{rows} × {length} a step, {topology.size:,} chips"),
  ]


def time(seconds: float) -> str:
  """Seconds as text, in s, ms or µs."""
  for unit, name in ((1.0, "s"), (1e-3, "ms")):
    if seconds >= unit:
      return f"{seconds / unit:,.2f} {name}"
  return f"{seconds / 1e-6:,.1f} µs"


def size(count: float) -> str:
  """Bytes as text, in GiB, MiB, KiB or B."""
  for unit, name in ((GIB, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")):
    if count >= unit:
      return f"{count / unit:,.2f} {name}"
  return f"{count:,.0f} B"

"""The end of a run: its result, its exported adapter, and its page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_flax.adapt import training
from lorax_flax.adapt.partition import combine, partition, trainable_mask
from lorax_flax.distributed import processes
from lorax_flax.files import bucket, workdir
from lorax_flax.methods import Adapter
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train.logs import confusion, curves, page
from lorax_flax.train.logs.history import Diverged, History
from lorax_flax.train.trials import Run

_NOTHING = "Nothing was saved yet"


def finish(
  run: Run,
  history: History,
  trained: Adapter,
  kept: int | None,
  seconds: Mapping[str, float],
) -> dict[str, Any] | Diverged | None:
  """Writes a run's result and exports its best adapter; of one that was pruned nothing.

  Args:
    trained: the trained leaves at the best evaluation.
    kept: step of the last checkpoint.
    seconds: wall time by what it was spent on.
  """
  if history.failed is not None:
    advice = f"The checkpoint of step {kept} is kept" if kept else _NOTHING
    diverged = Diverged(**history.failed, kept=f". {advice}")
    report(run, history, f"Ended at step {diverged.step:,}: {diverged}")
    return diverged
  if history.pruned is not None:
    step, reason = history.pruned["step"], history.pruned["reason"]
    report(run, history, f"Stopped at step {step:,}: {reason}")
    return None
  rest = partition(run.adapter, trainable_mask(run.adapter))[1]
  adapter = meshes.gather(combine(trained, rest))
  result = history.result(training.size(adapter), seconds)
  with bucket.staging(run.folder) as here:
    paths = run.export(adapter, result, here)
  result |= {n: str(run.folder / Path(p).relative_to(here)) for n, p in paths.items()}
  if processes.first():
    title = run.about.title
    curves.draw(run.folder / workdir.CURVES, history.record.lines, title)
    if table := result.get("report", {}).get("confusion"):
      confusion.draw(run.folder / workdir.CONFUSION, table, title)
    report(run, history, "Finished.", result)
    workdir.write_json(run.folder / workdir.RESULT, result)
  return result


def report(
  run: Run, history: History, status: str, result: Mapping[str, Any] | None = None
) -> None:
  """Writes report.html anew; process 0 alone."""
  if processes.first():
    best = history.best_and_last()[0]["step"]
    record = history.record
    text = page.render(run.about, record.lines, best, status, result, record.samples)
    workdir.write_text(run.folder / workdir.REPORT, text)

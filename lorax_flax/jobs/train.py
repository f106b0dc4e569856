"""The line from settings to results: mesh, model, task's data, adapter, fit, export."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_flax.jobs import build, claim, compile_cache
from lorax_flax.jobs.export import export
from lorax_flax.jobs.settings import Settings
from lorax_flax.tasks import task as tasks
from lorax_flax.train import loop
from lorax_flax.train.loop import Job
from lorax_flax.train.step import Model
from lorax_flax.train.trials import Run

log = logging.getLogger(__name__)


def train(runs: Mapping[Path, Settings], checkpoints: Path) -> list[Any]:
  """Trains N >= 1 runs in one program; see `lorax_flax.train.loop.fit`.

  Args:
    runs: settings by the workdir; they differ in the seed, and in what no weight or
      example depends on.
    checkpoints: folder of what they share.
  """
  claim.check_writable(runs)
  compile_cache.use(next(iter(runs.values())).compilation_cache)
  job = prepare(runs)
  claim.claim(runs)
  return loop.fit(job, checkpoints)


def prepare(runs: Mapping[Path, Settings]) -> Job:
  """Builds what is trained; arguments as in `train`."""
  first, configs = next(iter(runs.values())), [own.train for own in runs.values()]
  task = tasks.of(first.data)
  mesh = build.mesh(first.mesh, first.train)
  max_length, seed = first.data.max_length, first.train.seed
  model = build.model(first.model, task, max_length, mesh, seed)
  splits, lengths = build.rows(first.data, task, model)
  _, forward = build.adapt(model, first.model, first.lora)
  made = []
  for workdir, own in runs.items():
    mine = model if own.train.seed == seed else model.reseeded(own.train.seed)
    lora, _ = build.adapt(model, own.model, own.lora)
    adapter = build.adapter(
      lora, mine, splits, lengths, own.train.seed, own.init_adapter
    )
    write = export(own.lora, own.model.path, task, mine)
    title = f"{task.name}, {own.model.path}"
    name = workdir.name if len(runs) > 1 else ""
    made.append(Run(own.train, adapter, workdir, write, title, name))
  for line in build.describe(made[0].adapter, model.params):
    log.info(line)
  return Job(
    made,
    Model(forward, model.params, build.axes(model), mesh),
    task.objective(first.train.label_smoothing),
    build.batches(splits, lengths, configs),
  )

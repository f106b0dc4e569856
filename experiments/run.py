"""Trains an adapter, evaluates it and writes it down.

  python -m experiments.run --config=quickstart.py --workdir=DIR
  python -m experiments.run --config=quickstart.py:full --config.train.epochs=1
  python -m experiments.run --config=glue_rte.py --config.data.glue_dir=FOLDER
  python -m experiments.run --config=llama3_8b_instruct.py --config.data.path=FOLDER

DIR then holds report.html, adapter/ (PEFT's format, with a model card; model/ where
all weights were trained), result.json, metrics.jsonl, curves.png, tensorboard/,
config.json, checkpoints/ and, of a classifier, confusion.png; of a language model
samples.jsonl, its answers to a few prompts (--config.data.prompts=N) by step.
The same command resumes a run that was killed, or that SIGTERM told to save and
stop (exit code 143), on the same or on other devices.

Several devices: --config.mesh.data, .fsdp, .tensor and (for mixtures) .expert say how
many along each axis, and one of them -1, what is left. JAX_NUM_CPU_DEVICES=8 in the
environment makes a CPU eight devices. Several processes, which share DIR: `python -m
launch.local` starts them here, and launch.gcloud, .slurm, .xpk and .sky on clusters
(--distributed joins them).

Compiled programs are kept for the next start, in the user's cache or in
--config.compilation_cache=FOLDER. It and the workdir may lie in a bucket,
gs://BUCKET/FOLDER (with the extra gcs). JAX_ENABLE_COMPILATION_CACHE=false keeps none.
"""

from experiments.cli import collector, large_pages

if __name__ == "__main__":
  large_pages.restart()  # First, or all that is imported would be imported twice.
  collector.seldom()

import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments.cli import command as cli
from experiments.cli import config_flag, run_flags

if TYPE_CHECKING:
  from lorax_flax.jobs.settings import Settings
  from lorax_flax.train.loop import Job

log = logging.getLogger("lorax_flax.run")

FLAGS = flags.FlagValues()
config_flag.define(FLAGS)
DISTRIBUTED = run_flags.distributed(FLAGS)
WORKDIR = run_flags.workdir(FLAGS, "runs/CONFIG")


def run(settings: "Settings", workdir: Path) -> dict[str, Any]:
  """Trains a run, or resumes it; returns the content of its result.json.

  Raises:
    LoraxError: settings, files or a workdir that do not fit; Diverged.
    processes.Preempted: SIGTERM asked for it; everything is saved.
  """
  # Here, since --help and mistakes in flags need not wait for them.
  from lorax_flax.distributed import processes
  from lorax_flax.files import workdir as files

  files.check(workdir, settings.to_json())
  result = files.result(workdir)
  # A workdir that only the first process sees is enough for what is not a checkpoint.
  if processes.broadcast(result is not None):
    log.info(f"{workdir} holds this run, finished; delete it to run again.")
    return result or {}
  [trained] = train({workdir: settings}, workdir)
  if isinstance(trained, Exception):
    raise trained
  return trained


def train(
  runs: Mapping[Path, "Settings"], checkpoints: Path, **turns: Any
) -> list[Any]:
  """Trains N >= 1 runs in one program; see `lorax_flax.train.loop.fit`.

  Args:
    runs: settings by the workdir; they differ in the seed, and in what no weight or
      example depends on.
    checkpoints: folder of what they share.
    turns: fields of the job by which they take turns: `places`, `judge`, `watch`.
  """
  from lorax_flax.jobs import claim, compile_cache
  from lorax_flax.train import loop

  claim.check_writable(runs)
  compile_cache.use(next(iter(runs.values())).compilation_cache)
  with claim.locked((*runs, checkpoints)):
    job = dataclasses.replace(prepare(runs), **turns)
    claim.claim(runs, job.fingerprints)
    return loop.fit(job, checkpoints)


def prepare(runs: Mapping[Path, "Settings"]) -> "Job":
  """Builds what is trained; arguments as in `train`."""
  from lorax_flax.distributed import processes
  from lorax_flax.jobs import about as describe
  from lorax_flax.jobs import build, fingerprint, provenance, starts
  from lorax_flax.jobs.export import export
  from lorax_flax.tasks import task as tasks
  from lorax_flax.train.loop import Job
  from lorax_flax.train.step import Model
  from lorax_flax.train.trials import Run

  first = next(iter(runs.values()))
  seed, max_length = first.train.seed, first.data.max_length
  task = tasks.opened(first.data)
  mesh = build.mesh(first.mesh, first.train)
  model = build.model(
    first.model, task, max_length, mesh, seed, first.init_adapter, first.soft
  )
  splits, lengths = build.rows(first.data, task, model, mesh)
  objective = task.objective(first.train.label_smoothing)
  _, forward = build.adapt(model, first.model, first.lora, objective)
  prints = (
    fingerprint.of(model, splits, first.init_adapter) if processes.first() else {}
  )
  prove = provenance.prover(model, prints)
  made, plans = [], {}
  for workdir, own in runs.items():
    mine = model if own.train.seed == seed else model.reseeded(own.train.seed)
    key = repr(own.lora)  # A plan takes a trace of the model.
    if key not in plans:
      lora, _ = build.adapt(model, own.model, own.lora, objective)
      plans[key] = lora, build.plan(lora, mine, splits, lengths)
    lora, plan = plans[key]
    batches = functools.partial(build.train_batches, splits.train, lengths, own.train)
    start = starts.started(plan, lora, mine, own.train.seed, objective, batches, mesh)
    adapter = build.adapter(start, mine, own.init_adapter)
    about = describe.about(own, task, mine, plan, adapter, splits, lengths, workdir)
    mine, adapter = build.released(mine, adapter)
    card = functools.partial(describe.card, own, task, mine, adapter, about)
    proof = functools.partial(prove, own, mine)
    write = export(own.lora, own.model.path, task, mine, card, proof)
    name = workdir.name if len(runs) > 1 else ""
    made.append(Run(own.train, adapter, workdir, write, about, name))
  model, _ = build.released(model, made[0].adapter)
  for line in build.describe(plan, made[0].adapter, model.params).values():
    log.info(line)
  return Job(
    made,
    Model(forward, model.params, build.axes(model), mesh),
    objective,
    build.batches(splits, lengths, [own.train for own in runs.values()]),
    prints,
    build.samples(first.data, task, model, splits),
  )


def main() -> int:
  chosen = config_flag.read(FLAGS)
  settings = chosen.settings()
  from experiments.cli import training
  from lorax_flax.distributed import processes
  from lorax_flax.files import bucket

  workdir = bucket.folder(WORKDIR.value or config_flag.default_workdir(chosen.spec))
  processes.initialize(DISTRIBUTED.value)
  if processes.first():
    print(f"Workdir: {workdir}", flush=True)
  return training.supervise(lambda: training.show(run(settings, workdir), workdir))


if __name__ == "__main__":
  cli.run(main, FLAGS, config_flag.help_text)

"""A dry run: one run's step, compiled for a slice, and its costs."""

from pathlib import Path

from launch.dryrun import costs, report
from launch.dryrun import step as shapes
from launch.dryrun.topology import Topology
from lorax_flax.errors import LoraxError
from lorax_flax.jobs.abstract import abstract
from lorax_flax.jobs.settings import Settings


def run(
  settings: Settings, topology: Topology, title: str, hlo_file: str | None = None
) -> None:
  """Prints the costs of a run's step.

  Args:
    hlo_file: a path to write the compiled program's text to.

  Raises:
    LoraxError: the step does not fit into a chip's memory.
  """
  job = abstract(settings, topology.devices)
  for line in job.notes:
    print(line)
  print()
  with report.spinner("compiling"):
    useful = shapes.useful_flops(settings, topology)
    try:
      found, text = costs.measure(job, topology, useful)
    except costs.TooLarge as error:
      print(report.too_large(title, job, error))
      raise LoraxError(
        f"{error}. More of mesh.fsdp or mesh.tensor, --config.model.remat=full, a"
        " smaller batch or train.accumulation need less; --suggest tries them"
      ) from error
  print(report.table(title, found, job, topology))
  if hlo_file is not None:
    Path(hlo_file).write_text(text, "utf-8")

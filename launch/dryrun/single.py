"""What one way to run costs on a slice."""

from pathlib import Path

from launch.dryrun import costs, report
from launch.dryrun import step as shapes
from launch.dryrun.topology import Topology
from lorax_flax.errors import LoraxError
from lorax_flax.jobs.settings import Settings


def run(
  wanted: Settings,
  topology: Topology,
  title: str,
  text_to: str | None = None,
) -> None:
  """Prints the costs of a run's step.

  Args:
    text_to: a file to write the compiled program's text to.

  Raises:
    LoraxError: it does not fit.
  """
  job = shapes.job(wanted, topology)
  for line in job.notes:
    print(line)
  report.show("")
  with report.working("compiling"):
    useful = shapes.useful_flops(wanted, topology)
    try:
      found, text = costs.measure(job, topology, useful)
    except costs.TooLarge as error:
      report.show(report.too_large(title, job, error))
      raise LoraxError(
        f"{error}. More of mesh.fsdp or mesh.tensor, --config.model.remat=full, a"
        " smaller batch or train.accumulation need less; --suggest tries them"
      ) from error
  report.show(report.table(title, found, job, topology))
  if text_to is not None:
    Path(text_to).write_text(text, "utf-8")

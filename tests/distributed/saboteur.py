"""`experiments.run`, of which one process comes to harm.

SABOTAGE="PROCESS DEED STEP" in the environment says which, how and when: "kill" ends it
while the step is under way, "kill-save" while the checkpoint of that step is written,
"term" sends it SIGTERM, "raise" is an error that only it has.
"""

import os
import signal

import jax

from experiments import run
from experiments.cli import command as cli
from experiments.cli import config_flag
from lorax_flax.distributed.processes import StopRequest
from lorax_flax.errors import LoraxError
from lorax_flax.train.checkpoint import Checkpoints


def harm(number: int, deed: str, step: int) -> None:
  """Makes this process come to harm, if it is the one."""
  save, reached = Checkpoints.save, StopRequest.reached

  def saving(self, at, *args):
    save(self, at, *args)
    if at == step and jax.process_index() == number and deed == "kill-save":
      os.kill(os.getpid(), signal.SIGKILL)

  def reaching(self, at):
    if at == step and jax.process_index() == number:
      if deed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
      if deed == "term":
        os.kill(os.getpid(), signal.SIGTERM)
      if deed == "raise":
        raise LoraxError("this process alone has come to harm")
    return reached(self, at)

  Checkpoints.save, StopRequest.reached = saving, reaching


if __name__ == "__main__":
  if "SABOTAGE" in os.environ:
    number, deed, step = os.environ["SABOTAGE"].split()
    harm(int(number), deed, int(step))
  cli.run(run.main, run.FLAGS, config_flag.help_text)

"""What every command shares: one message for a user's mistake, and an exit code."""

import os

import pytest
from absl import flags

from experiments.cli import command as cli
from lorax_flax.errors import LoraxError
from tests.experiments import commands

COMMAND = '''"""Adds one."""
import logging
from absl import flags
from experiments.cli import command as cli
from lorax_flax.errors import LoraxError
FLAGS = flags.FlagValues()
N = flags.DEFINE_integer("n", 1, "A number.", flag_values=FLAGS)
def main():
  if N.value == 2: raise LoraxError("two is not allowed")
  if N.value == 3: open("/proc/version", "w")
  if N.value == 4: return 7
  if N.value == 5: raise KeyError("a fault of ours")
  if N.value == 6: raise KeyboardInterrupt
  logging.getLogger("lorax_flax.x").info("ours")
  logging.getLogger("jax").info("theirs")
  print(N.value + 1)
if __name__ == "__main__": cli.run(main, FLAGS, more_help=lambda argv: str(len(argv)))
'''


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  folder = tmp_path_factory.mktemp("command")
  (folder / "command.py").write_text(COMMAND)
  path = f"{folder}{os.pathsep}{commands.ROOT}"
  return lambda *args: commands.run("command", *args, PYTHONPATH=path)


def test_a_command_runs_and_its_exit_code_is_its_own(command):
  assert command("--n=4").returncode == 7
  done = command("--n=1")
  assert (done.returncode, done.stdout) == (0, "2\n")


def test_what_we_report_is_shown_and_what_other_libraries_report_is_not(command):
  said = command("--n=1").stderr.splitlines()
  assert len(said) == 1
  assert said[0].endswith("ours")
  assert "theirs" in command("--n=1", "--v=1").stderr


@pytest.mark.parametrize(
  ("args", "code", "says"),
  [
    (["--n=2"], 1, "error: two is not allowed\n"),
    (["--n=x"], 1, "error: flag --n=x: invalid literal"),
    (["--m=1"], 1, "error: Unknown command line flag 'm'"),
    (["--n=1", "more"], 1, "error: unexpected argument 'more'"),
    (["--n=6"], 130, "interrupted\n"),
  ],
)
def test_a_users_mistake_is_one_message_without_a_traceback(command, args, code, says):
  done = command(*args)
  assert done.returncode == code
  assert done.stderr.startswith(says)
  assert len(done.stderr.splitlines()) == 1


def test_a_fault_of_ours_keeps_its_traceback(command):
  done = command("--n=5")
  assert done.returncode == 1
  assert "Traceback" in done.stderr


def test_help_prints_what_the_command_is_its_flags_and_what_it_adds(command):
  done = command("--help", "--n=x")
  assert done.returncode == 0
  assert done.stdout.startswith("Adds one.")
  assert "A number." in done.stdout
  assert done.stdout.endswith("\n\n3\n")


def test_a_missing_flag_is_named():
  values = flags.FlagValues()
  flags.DEFINE_string("base", None, "A base.", flag_values=values, required=True)
  with pytest.raises(LoraxError, match=r"^Flag --base must have a value"):
    cli.parse(values, ["program"])


def test_two_commands_of_one_process_keep_their_flags_apart():
  from experiments import merge, predict

  cli.parse(merge.FLAGS, ["merge", "--base=a", "--adapter=b", "--out=c"])
  cli.parse(predict.FLAGS, ["predict", "--base=d", "--input=e", "--out=f"])
  assert (merge.BASE.value, predict.BASE.value) == ("a", "d")

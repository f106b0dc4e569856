"""The command `lorax`."""

import configparser
import importlib

import pytest

from experiments.cli import main
from tests.experiments import commands, peers


def _lorax(*arguments):
  return commands.run("experiments.cli.main", *arguments)


def test_it_is_installed_as_lorax():
  config = configparser.ConfigParser()
  config.read(peers.ROOT / "setup.cfg")
  scripts = config["options.entry_points"]["console_scripts"]
  name, _, target = scripts.strip().partition(" = ")
  module, _, function = target.partition(":")
  assert name == "lorax"
  assert getattr(importlib.import_module(module), function) is main.main


def test_help_lists_every_command_and_imports_no_jax():
  program = (
    "import sys; from experiments.cli import main; main.main(['--help']); "
    "sys.exit('jax' in sys.modules)"
  )
  done = peers.python("-c", program)
  assert done.returncode == 0, done.stderr
  for name in main.COMMANDS:
    assert f"\n  {name}  " in done.stdout
  assert "merge          Writes a base with an adapter merged in" in done.stdout


def test_every_module_of_the_table_is_a_command():
  for module in main.COMMANDS.values():
    assert main._about(module)


@pytest.mark.parametrize(
  ("name", "module"), [("merge", "experiments.merge"), ("launch local", "launch.local")]
)
def test_a_commands_help_is_the_modules(name, module):
  ours = _lorax(*name.split(), "--help")
  theirs = commands.run(module, "--help")
  assert (ours.returncode, theirs.returncode) == (0, 0)
  assert ours.stdout == theirs.stdout


def test_a_commands_mistake_is_one_message_and_its_exit_code():
  done = _lorax("train", "--config=quickstrat.py")
  assert done.returncode == 1
  assert done.stderr.startswith("error: unknown config 'quickstrat'; did you mean")
  assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["trian"], "unknown command 'trian'; did you mean 'train'"),
    (["launch", "slrm"], "unknown command 'launch slrm'; did you mean 'launch slurm'"),
  ],
)
def test_an_unknown_command_names_the_nearest(arguments, message, capsys):
  assert main.main(arguments) == 1
  assert message in capsys.readouterr().err


def test_the_sweeps_launch_says_where_it_went():
  done = _lorax("sweep", "--config=quickstart.py", "--launch=slurm --nodes=2")
  assert done.returncode == 1
  assert (
    "python -m launch.sweep --config=… --workdir=… -- slurm --nodes=2" in done.stderr
  )


@pytest.mark.parametrize(
  "module", [m for name, m in main.COMMANDS.items() if not name.startswith("launch ")]
)
def test_what_takes_a_base_takes_a_quantised_one(module):
  if importlib.util.find_spec(module).submodule_search_locations:
    module += ".__main__"
  flags = importlib.import_module(module).FLAGS
  # A run's is --config.model.quant, and an adapter's provenance says it to verify.
  takes = {"base"} if module == "experiments.verify" else {"base", "quant"}
  assert {"base", "quant"} & {*flags} in (set(), takes)

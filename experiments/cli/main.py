"""The command `lorax`: the project's commands by name.

  lorax train --config=quickstart.py --workdir=DIR
  lorax merge --help

`lorax NAME …` is `python -m MODULE …`: the same code, the same flags, the same help.
"""

import ast
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

# By name, since `launch` is above this package and --help is to start fast.
COMMANDS = {
  "train": "experiments.run",
  "data": "experiments.data",
  "sweep": "experiments.sweep",
  "predict": "experiments.predict",
  "generate": "experiments.generate",
  "chat": "experiments.chat",
  "serve": "experiments.serve",
  "score": "experiments.score",
  "e2e": "experiments.e2e",
  "merge": "experiments.merge",
  "convert": "experiments.convert",
  "combine": "experiments.combine",
  "verify": "experiments.verify",
  "dryrun": "launch.dryrun",
  "launch local": "launch.local",
  "launch sweep": "launch.sweep",
  "launch slurm": "launch.slurm",
  "launch gcloud": "launch.gcloud",
  "launch xpk": "launch.xpk",
  "launch sky": "launch.sky",
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command that the first one or two arguments name.

  Args:
    argv: arguments without the program's name; sys.argv's by default.

  Returns:
    0 after --help, 1 where there is no such command; a command itself may exit.
  """
  argv = sys.argv[1:] if argv is None else list(argv)
  if not argv or argv[0] in ("-h", "-help", "--help", "help"):
    print(overview())
    return 0
  for words in (2, 1):
    module = COMMANDS.get(" ".join(argv[:words]))
    if module is not None:
      sys.argv = [sys.argv[0], *argv[words:]]
      runpy.run_module(module, run_name="__main__", alter_sys=True)
      return 0
  # Here, since it imports JAX.
  from lorax_flax.errors import unknown

  name = " ".join(argv[: 2 if argv[0] == "launch" else 1])
  print(f"error: {unknown('command', name, COMMANDS)}", file=sys.stderr)
  return 1


def overview() -> str:
  """The commands, each with the first line of its module's docstring."""
  width = max(map(len, COMMANDS))
  lines = [f"  {name:<{width}}  {_about(m)}" for name, m in COMMANDS.items()]
  return "\n".join(
    ["usage: lorax COMMAND [FLAGS]", "", *lines, "", "lorax COMMAND --help says more."]
  )


def _about(module: str) -> str:
  found = importlib.util.find_spec(module)
  if found is not None and found.submodule_search_locations is not None:
    found = importlib.util.find_spec(f"{module}.__main__")
  assert found is not None
  assert found.origin is not None
  text = ast.get_docstring(ast.parse(Path(found.origin).read_text("utf-8"))) or ""
  return text.splitlines()[0]


if __name__ == "__main__":
  sys.exit(main())

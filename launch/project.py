"""The project's code as it is sent to a cluster, and how it is installed there."""

from collections.abc import Sequence
from pathlib import Path

from launch.calls import Call
from lorax_flax.errors import LoraxError

# Files that are made for a client to read.
FOLDER = Path("runs") / "launch"
# The parts of the project that a run needs.
_SENT = (
  *("setup.cfg", "pyproject.toml", "README.md"),
  *("lorax_flax", "experiments", "launch"),
)


def install(extras: str) -> str:
  """A line of shell that installs the code of the working directory, once.

  TPU VMs come with a Python that is too old for JAX; uv brings a newer one.
  """
  return (
    "{ [ -x .venv/bin/python ] || { python3 -m pip install -q --user uv && "
    "python3 -m uv venv -q --python=3.12 .venv && python3 -m uv pip install -q "
    f"--python=.venv/bin/python -e '.[{extras}]'; }}; }}"
  )


def packed(name: str, send: Sequence[str]) -> tuple[str, list[Call]]:
  """The path of an archive of the project's code, and the calls that make it.

  Args:
    name: the job's name.
    send: relative paths of further files and folders to pack.

  Raises:
    LoraxError: the code is not checked out here; a path in `send` does not exist.
  """
  root = Path(__file__).resolve().parents[1]
  if not (root / "setup.cfg").is_file():
    raise LoraxError(
      "the code to send is installed here, not checked out: install it with pip install"
      " -e"
    )
  for path in send:
    if Path(path).is_absolute() or not Path(path).exists():
      raise LoraxError(
        f"--send={path}: give a file or folder below the working directory"
      )
  archive = f"{FOLDER}/{name}.tar.gz"
  pack = ["tar", "-czf", archive, "--exclude=__pycache__", *send]
  return archive, [
    Call(("mkdir", "-p", str(FOLDER))),
    Call((*pack, "-C", str(root), *_SENT)),
  ]


def unpacked(name: str, send: Sequence[str]) -> tuple[str, list[Call]]:
  """The path of a folder of the project's code alone, and the calls that make it."""
  archive, calls = packed(name, send)
  folder = f"{FOLDER}/{name}"
  calls += [
    Call(("rm", "-rf", folder)),
    Call(("mkdir", folder)),
    Call(("tar", "-xzf", archive, "-C", folder)),
  ]
  return folder, calls

"""The one restart that a training command makes."""

import os
import subprocess
import sys

import pytest

from experiments.cli import large_pages
from tests.experiments import peers

NEEDS_LARGE_PAGES = pytest.mark.skipif(
  not large_pages._available(), reason="no glibc with large pages"
)
SCRIPT = """
import os, sys
from experiments.cli import large_pages
print("started", sys.argv[1:], flush=True)
large_pages.restart()
print("tunables", os.environ.get("GLIBC_TUNABLES"), flush=True)
"""


def started(tmp_path, **environment):
  script = tmp_path / "script.py"
  script.write_text(SCRIPT)
  clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
  return subprocess.run(
    [sys.executable, script, "--a=b c"],
    env=clean | paths | environment,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.splitlines()


@NEEDS_LARGE_PAGES
@pytest.mark.parametrize("name", ["run", "sweep", "e2e"])
def test_a_command_starts_anew_before_it_imports_jax(name):
  program = f"""
import os, runpy, sys
os.environ.pop("GLIBC_TUNABLES", None)
def execve(*_):
  print("jax" in sys.modules, flush=True)
  os._exit(0)
os.execve = execve
runpy.run_module("experiments.{name}", run_name="__main__", alter_sys=True)
"""
  assert peers.python("-c", program).stdout == "False\n"


@NEEDS_LARGE_PAGES
def test_a_command_starts_anew_once_with_the_same_arguments(tmp_path):
  first, again, tunables = started(tmp_path)
  assert first == again == "started ['--a=b c']"
  assert tunables == "tunables glibc.malloc.hugetlb=1"


def test_what_the_user_says_of_large_pages_stays(tmp_path):
  said = "glibc.malloc.hugetlb=0"
  first, tunables = started(tmp_path, GLIBC_TUNABLES=said)
  assert (first, tunables) == ("started ['--a=b c']", f"tunables {said}")


def test_other_tunables_stay():
  given = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2", "A": "b"}
  want = "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"
  assert large_pages.with_large_pages(given) == {"A": "b", "GLIBC_TUNABLES": want}

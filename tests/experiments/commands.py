"""Commands in processes of their own, each forked from one that has imported JAX."""

import atexit
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A process for each line of its input, which says how it ended and what it printed.
_FORKS = """
import json, os, runpy, sys, tempfile
import experiments.cli.command
for line in sys.stdin:
  folder, module, *sys.argv[1:] = json.loads(line)
  files = [tempfile.TemporaryFile() for _ in range(2)]
  child = os.fork()
  if not child:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
      os.dup2(file.fileno(), number)
    os.chdir(folder)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()
  code, texts = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), []
  for file in files:
    file.seek(0)
    texts.append(file.read().decode())
  print(json.dumps([code, *texts]), flush=True)
"""


def run(module, *args, cwd=ROOT, **environment):
  """A command, as `python -m MODULE ARGS` in a folder would run it."""
  forks = _forks(tuple(environment.items()))
  print(json.dumps([str(cwd), module, *args]), file=forks.stdin, flush=True)
  code, out, err = json.loads(forks.stdout.readline())
  return subprocess.CompletedProcess([module, *args], code, out, err)


@functools.cache
def _forks(environment):
  own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **dict(environment)}
  process = subprocess.Popen(
    [sys.executable, "-c", _FORKS],
    cwd=ROOT,
    env=os.environ | own,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  atexit.register(_end, process)
  return process


def _end(process):
  process.stdin.close()
  process.wait()

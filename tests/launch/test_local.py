"""The launcher, with programs that only Python is needed for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import local
from lorax_flax.distributed import subprocesses

ROOT = Path(__file__).parents[2]


def _launch(program, *flags, **options):
  return subprocess.Popen(
    [sys.executable, "-m", "launch.local", *flags, "--", "-c", program],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )


def _run(program, *flags):
  process = _launch(program, *flags)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def test_each_process_is_told_which_it_is_and_its_lines_say_so():
  program = (
    "import os, sys\n"
    "names = 'PROCESS_ID NUM_PROCESSES NUM_CPU_DEVICES COORDINATOR_ADDRESS'\n"
    "print(*(os.environ['JAX_' + name] for name in names.split()))\n"
    "print('a warning', file=sys.stderr)\n"
  )
  code, out, err = _run(program, "--processes=3", "--devices=2")
  assert code == 0
  said = dict(line.split("] ") for line in out.splitlines())
  address = said["[0"].split()[-1]
  assert address.startswith("127.0.0.1:")
  assert said == {f"[{i}": f"{i} 3 2 {address}" for i in range(3)}
  assert sorted(err.splitlines()) == [f"[{i}] a warning" for i in range(3)]


def test_the_coordinator_listens_on_the_loopback_alone():
  found = local.environment(1, 2, "127.0.0.1:5", None, {"KEPT": "1"})
  assert found["JAX_COORDINATOR_BIND_ADDRESS"] == "127.0.0.1:5"
  assert found["KEPT"] == "1"
  assert "JAX_NUM_CPU_DEVICES" not in found
  assert "JAX_PLATFORMS" not in found


def test_when_one_fails_the_others_are_ended_and_its_code_is_the_launchers():
  program = (
    "import os, sys, time\n"
    "if os.environ['JAX_PROCESS_ID'] == '1': sys.exit(7)\n"
    "time.sleep(60)\n"
  )
  before = time.monotonic()
  code, _, err = _run(program, "--processes=3", "--grace=0.5")
  assert code == 7
  assert time.monotonic() - before < 20
  assert "process 1 of 3 ended with code 7; the other 2 have 0.5 s to end" in err
  assert "process 0 has not ended, and is killed" in err
  assert "process 2 has not ended, and is killed" in err


def _ends(*codes):
  """The exit code and the lines, where processes have ended at the same time."""
  lines = []
  processes = iter([SimpleNamespace(poll=lambda code=code: code) for code in codes])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      subprocesses, "_start", lambda *args: subprocesses._Process(next(processes))
    )
    patch.setattr(
      local, "print", lambda line, **kwargs: lines.append(line), raising=False
    )
    code = local.run(["-c", ""], len(codes), grace=1)
  return code, lines


def test_one_that_a_signal_ended_is_named_before_those_that_failed_of_it():
  code, said = _ends(1, -signal.SIGKILL, 0)
  assert code == 128 + signal.SIGKILL
  assert said == ["launch: process 1 of 3 was ended by SIGKILL"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process(number):
  program = (
    "import signal, sys, time\n"
    "def stop(number, frame): print('stopping', flush=True); sys.exit(143)\n"
    f"signal.signal({int(number)}, stop)\n"
    "print('ready', flush=True)\n"
    "time.sleep(60)\n"
  )
  process = _launch(program, "--processes=2")
  assert process.stdout is not None
  ready = {process.stdout.readline(), process.stdout.readline()}
  assert ready == {"[0] ready\n", "[1] ready\n"}
  os.kill(process.pid, number)
  out, _ = process.communicate(timeout=30)
  assert process.returncode == 143
  assert sorted(out.splitlines()) == ["[0] stopping", "[1] stopping"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "what shall run"),
    (["--processes=0", "--", "-c", ""], "at least 1, not 0"),
    (["--devices=two", "--", "-c", ""], "at least 1, not two"),
    (["--prcesses=2", "--", "-c", ""], "unrecognized arguments: --prcesses=2"),
  ],
)
def test_a_mistake_in_the_arguments_is_named(arguments, message, capsys):
  with pytest.raises(SystemExit) as error:
    local.main(arguments)
  assert error.value.code == 2
  assert message in capsys.readouterr().err


def test_of_several_at_once_a_mistake_is_named_before_those_that_lost_it():
  assert _ends(144, 1, 144)[0] == 1

"""The command in several processes that come to harm; see `saboteur`."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from jax.experimental import multihost_utils

from experiments import run
from experiments.cli import command as cli
from experiments.cli import config_dict, config_flag
from lorax_flax.distributed import processes
from tests.train import tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp("processes")
  return tiny.write(folder, num_hidden_layers=1, hidden_dropout_prob=0.0)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
  """The run in one process, that nothing interrupted."""
  return _here(config, tmp_path_factory.mktemp("alone"))


def _here(config, workdir):
  run.run(config_dict.convert(config_flag.load(str(config))), workdir)
  return workdir


def _launch(config, workdir, count, *flags, sabotage="-1 none 0", devices=2):
  """Several processes with some devices each: the exit code, and all lines."""
  done = subprocess.run(
    [
      *(sys.executable, "-m", "launch.local", f"--processes={count}"),
      *(f"--devices={devices}", "--grace=30", "--", "-m", "tests.distributed.saboteur"),
      *(f"--config={config}", f"--workdir={workdir}", *flags),
    ],
    cwd=tiny.ROOT,
    env=os.environ | {"SABOTAGE": sabotage},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=300,
    check=False,
  )
  return done.returncode, done.stdout


def _checkpoints(workdir):
  return sorted(p.name for p in (workdir / "checkpoints").iterdir())


def _check_same(workdir, wanted):
  """Metrics, result and adapter, to rounding."""
  got, want = (
    [json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()]
    for w in (workdir, wanted)
  )
  assert [list(line) for line in got] == [list(line) for line in want]
  for line, right in zip(got, want, strict=True):
    assert line == pytest.approx(right, abs=1e-5)
  got, want = (json.loads((w / "result.json").read_text()) for w in (workdir, wanted))
  # 21 in batches of 8: every example counts once, however many processes there are.
  assert got["examples_evaluated"] == want["examples_evaluated"] == 21
  for name in ("accuracy", "eval_loss", "best_step", "last", "tokens"):
    assert got[name] == pytest.approx(want[name], abs=1e-5)
  got, want = (
    safetensors.numpy.load_file(w / "adapter" / "adapter_model.safetensors")
    for w in (workdir, wanted)
  )
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(got[name], want[name], atol=1e-5, err_msg=name)
    assert np.abs(want[name]).max() > 1e-3  # or the tolerance would mean nothing


def test_a_run_moves_between_devices_and_meshes_and_survives(config, alone, tmp_path):
  # One is told to stop: both save, and exit with SIGTERM's code.
  code, said = _launch(
    *(config, tmp_path, 2, "--config.mesh.fsdp=2", "--config.mesh.tensor=2"),
    sabotage="1 term 4",
    devices=4,
  )
  assert code == 143, said
  assert "8 devices: data 2 × fsdp 2 × tensor 2, in 2 processes" in said
  told = re.search(r"told to stop: saved at step (\d+)", said)
  assert told, said
  step = told[1]  # The first that neither had passed.
  assert 4 < int(step) < 9
  assert "Traceback" not in said
  assert step in _checkpoints(tmp_path)

  # They go on with fewer devices and another mesh, and one dies while a checkpoint is
  # written.
  code, said = _launch(config, tmp_path, 2, "--config.mesh.tensor=2",
                       sabotage="1 kill-save 9")  # fmt: skip
  assert code == 128 + 9, said
  assert f"resuming after step {step} of" in said
  assert "[0] error: process 1 of 2 is gone" in said
  assert "process 1 of 2 was ended by SIGKILL" in said
  assert "Traceback" not in said
  assert "has not ended" not in said
  assert "8" in _checkpoints(tmp_path)
  assert "9" not in _checkpoints(tmp_path)

  # And they end it, with yet another one.
  code, said = _launch(config, tmp_path, 2, "--config.mesh.fsdp=-1",
                       "--config.mesh.data=1")  # fmt: skip
  assert code == 0, said
  assert "resuming after step 8" in said
  _check_same(tmp_path, alone)
  assert all(name.isdecimal() for name in _checkpoints(tmp_path))


def test_a_process_killed_in_a_step_ends_the_others_and_one_can_go_on(
  config, alone, tmp_path
):
  code, said = _launch(config, tmp_path, 2, sabotage="0 kill 7")
  assert code == 128 + 9, said
  assert "[1] error: process 0 of 2 is gone" in said
  assert "goes on from the last checkpoint" in said
  assert "Traceback" not in said
  assert _checkpoints(tmp_path)[0] == "4"
  _here(config, tmp_path)
  _check_same(tmp_path, alone)


def test_a_full_disk_is_one_error_in_several_processes(config, small_disk):
  folder = small_disk("160k")
  code, said = _launch(config, folder / "run", 2)
  assert code == 1, said
  assert "No space left on device" in said
  assert f"can't write a checkpoint to {folder}/run/checkpoints" in said
  assert "Traceback" not in said


def test_a_folder_that_can_not_be_written_is_said_before_anything_is_loaded(
  config, tmp_path, small_disk, monkeypatch
):
  monkeypatch.setattr("experiments.run.prepare", None)
  (tmp_path / "file").write_text("")
  for folder, message in (
    (tmp_path / "file" / "run", "error: Not a directory: "),
    (small_disk("16k", "ro") / "run", "error: Read-only file system: "),
  ):
    with pytest.raises(OSError, match="run") as error:
      _here(config, folder)
    assert cli.explain(error.value) == f"{message}{folder}"


def test_a_run_that_goes_on_hears_of_a_signal_that_came_before_its_first_step(
  monkeypatch,
):
  # JAX's rule: the answer is yes at the question after the last that anyone has asked.
  asked = []
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    multihost_utils,
    "reached_preemption_sync_point",
    lambda number: asked.append(number) or False,
  )
  stop = processes.StopRequest()
  for step in (101, 102):
    stop.reached(step)
  first = asked[0]
  assert asked == [first, first + 1]
  assert first < 101

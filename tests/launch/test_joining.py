"""Processes that a cluster has started find one another by the cluster's own word."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.launch import slurm
from tests.launch.standins import StandIns
from tests.train import tiny


def _free_port(of=range(20000, 60000)):
  for port in of:
    with socket.socket() as probe, contextlib.suppress(OSError):
      probe.bind(("127.0.0.1", port))
      return port
  raise AssertionError("no port is free")


def test_a_slurm_job_that_is_told_to_stop_is_queued_again_and_ends(tmp_path):
  clients = StandIns(tmp_path / "bin")
  for name in ("sbatch", "srun", "scontrol"):
    program = Path(slurm.__file__)
    clients.program(name, f'#!/bin/bash\nexec {sys.executable} {program} {name} "$@"\n')
  config = tiny.write(tmp_path / "tiny", num_hidden_layers=1)
  # JAX's port follows from the number of the job.
  job = (
    _free_port(range(slurm.FIRST_PORT + os.getpid() % 4000, 65536)) - slurm.FIRST_PORT
  )
  environment = {
    "PATH": f"{clients.folder}:{os.environ['PATH']}",
    "STANDIN_FOLDER": str(tmp_path),
    "STANDIN_JOB": str(job),
    "SABOTAGE": "1 term 4",
    "JAX_PLATFORMS": "cpu",
  }
  done = subprocess.run(
    [
      *(sys.executable, "-m", "launch.slurm", "--name=run", "--nodes=2", "--"),
      *("-m", "tests.distributed.saboteur", "--distributed", f"--config={config}"),
      f"--workdir={tmp_path / 'run'}",
    ],
    cwd=tiny.ROOT,
    env=os.environ | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=300,
    check=False,
  )
  said = done.stdout
  assert done.returncode == 0, said
  assert "2 devices: data 2, in 2 processes" in said
  told = re.search(r"told to stop: saved at step (\d+)", said)
  assert told, said
  assert "slurm: start 1 of run" in said
  assert f"resuming after step {told[1]} of 12" in said
  assert said.splitlines()[-1] == "slurm: the job ended with 0"
  # The first process was found by the name that the cluster calls it.
  assert "can't watch" not in said
  assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 12


class _Metadata(BaseHTTPRequestHandler):
  """What a TPU VM of Google's asks its host."""

  number = 0

  def do_GET(self):
    key = self.path.rpartition("/")[2]
    value = {
      "agent-worker-number": str(self.number),
      "worker-network-endpoints": "127.0.0.1,127.0.0.1",
      "tpu-env": "",
    }[key].encode()
    self.send_response(200)
    self.send_header("Content-Length", str(len(value)))
    self.end_headers()
    self.wfile.write(value)

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def _tpu_vms():
  """The environment of each of a pod's two VMs."""
  servers = [
    HTTPServer(("127.0.0.1", 0), type("_One", (_Metadata,), {"number": i}))
    for i in (0, 1)
  ]
  for server in servers:
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
  try:
    yield [
      {"GCE_METADATA_IP": f"127.0.0.1:{server.server_address[1]}"} for server in servers
    ]
  finally:
    for server in servers:
      server.shutdown()
      server.server_close()


@contextlib.contextmanager
def _gke_pods():
  """The environment of each of a job's two pods, as GKE sets it."""
  hosts = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.1", "TPU_SKIP_MDS_QUERY": "1"}
  with _tpu_vms() as machines:
    yield [
      machine | hosts | {"TPU_WORKER_ID": str(i)} for i, machine in enumerate(machines)
    ]


@pytest.mark.parametrize("cluster", [_tpu_vms, _gke_pods])
def test_workers_of_a_pod_join_by_the_pods_word(cluster):
  port = {"JAX_COORDINATOR_PORT": str(_free_port()), "JAX_PLATFORMS": "cpu"}
  with cluster() as environments:
    members = [
      subprocess.Popen(
        [sys.executable, "-m", "tests.launch.member"],
        cwd=tiny.ROOT,
        env=os.environ | port | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      for environment in environments
    ]
    said = [member.communicate(timeout=120)[0] for member in members]
  assert [s.splitlines()[-1] for s in said] == ["process 0 of 2", "process 1 of 2"]

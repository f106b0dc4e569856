"""The launchers of clusters, with stand-ins for the clusters' own clients."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import cluster, engines, project
from lorax_flax.errors import LoraxError
from tests.launch.standins import StandIns

ROOT = Path(__file__).parents[2]
# What each is given besides a name, at least.
FLAGS = {
  "gcloud": ["--zone=us-west4-a"],
  "slurm": [f"--python={sys.executable}"],
  "sky": [],
  "xpk": ["--cluster=pods", "--tpu-type=v6e-16", "--image=ours"],
}
CLIENTS = {"gcloud": "gcloud", "slurm": "sbatch", "sky": "sky", "xpk": "xpk"}
# Each shell between here and there would make something else of some of these.
HOSTILE = [
  *(".*/(query|value)/kernel", "two  spaces", "it's", '"quoted"', "$HOME", "$(id)"),
  *("`id`", "*", "~", "a\\b", "{x}", "!!", "# no", "", "é", "-", "<a>", "a;b&c", "%s"),
]
ECHO = ["-c", "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd()]))"]


@pytest.fixture
def clients(tmp_path, monkeypatch):
  """All of them, that only write down how they were called; an empty folder here."""
  made = StandIns(tmp_path / "bin")
  for client in CLIENTS.values():
    made.recorder(client, reads=client == "sbatch")
  monkeypatch.setenv("PATH", f"{made.folder}:{os.environ['PATH']}")
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  return made


def _main(name, *arguments):
  module = importlib.import_module(f"launch.{name}")
  return cluster.main(module.ENGINE, module.__doc__, list(arguments))


def _launch(name, *command, flags=()):
  return _main(name, "--name=job", *FLAGS[name], *flags, "--", *command)


def _there(name, calls, tmp_path):
  """Runs what a client was given as the cluster would, with its shells; the output."""
  there = tmp_path / "there"
  there.mkdir()
  environment = os.environ | {"HOME": str(there)}
  if name == "gcloud":
    shutil.copy("runs/launch/job.tar.gz", there / "lorax_flax.tar.gz")
    (ssh,) = [call for call in calls if "ssh" in call]
    (text,) = [a.partition("=")[2] for a in ssh if a.startswith("--command=")]
  elif name == "slurm":
    StandIns(there / "bin").program("srun", '#!/bin/bash\nshift\nexec "$@"\n')
    environment["PATH"] = f"{there / 'bin'}:{environment['PATH']}"
    text = calls[-1][-1]
  elif name == "xpk":
    (text,) = [a.partition("=")[2] for a in calls[-1] if a.startswith("--command=")]
    text = f"({text}) & wait $!"
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
  else:
    task = yaml.safe_load(Path("runs/launch/job.yaml").read_text())
    shutil.copytree(task["workdir"], there, dirs_exist_ok=True)
    _venv(there)
    text = task["run"]
    environment |= task["envs"]
    environment |= {
      "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
      "SKYPILOT_NODE_RANK": "1",
    }
    environment |= {"SKYPILOT_NUM_NODES": "2"}
  return subprocess.run(
    ["bash", "-c", text],
    cwd=there,
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  ).stdout


def _venv(folder):
  (folder / ".venv" / "bin").mkdir(parents=True)
  (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)


# Installing is the network's and the cluster's affair.
_LINK = f"mkdir -p .venv/bin && ln -sf {sys.executable} .venv/bin/python"


@pytest.mark.parametrize("name", engines.ENGINES)
def test_arguments_arrive_as_they_were_given(name, clients, tmp_path):
  flags = [f"--setup={_LINK}"] if name == "gcloud" else []
  assert _launch(name, *ECHO, *HOSTILE, flags=flags) == 0
  out = _there(name, clients.calls(), tmp_path)
  arguments, folder = json.loads(out)
  assert arguments == HOSTILE
  if name in ("gcloud", "sky"):  # Those that copy the code run where it is.
    assert (Path(folder) / "lorax_flax" / "train" / "loop.py").is_file()
    assert (Path(folder) / "setup.cfg").is_file()
    assert not any(Path(folder).rglob("__pycache__"))


@pytest.mark.parametrize("name", engines.ENGINES)
def test_settings_of_the_environment_arrive(name, clients, tmp_path):
  program = "import os; print(os.environ['A'], os.environ['B'], sep='|')"
  flags = ["--env=A=it's = $B", "--env=B="]
  flags += [f"--setup={_LINK}"] if name == "gcloud" else []
  assert _launch(name, "-c", program, flags=flags) == 0
  assert _there(name, clients.calls(), tmp_path) == "it's = $B|\n"


def test_sky_says_under_jaxs_names_who_the_others_are(clients, tmp_path):
  program = "import os; print(*(v for k, v in sorted(os.environ.items()) if k in %r))"
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  assert _launch("sky", "-c", program % (names,)) == 0
  assert _there("sky", clients.calls(), tmp_path) == "10.0.0.1:8476 2 1\n"


@pytest.mark.parametrize("name", engines.ENGINES)
def test_what_is_printed_is_a_script_that_does_the_same(name, clients, capsys):
  command = ("-m", "experiments.run", "--config.lora.targets=.*/'query'", "EOF")
  assert _launch(name, *command) == 0
  done = clients.calls()
  files = sorted(Path("runs").rglob("*.yaml"))
  texts = [file.read_text() for file in files]
  shutil.rmtree("runs", ignore_errors=True)
  assert _launch(name, *command, flags=["--print"]) == 0
  assert clients.calls() == []
  assert not Path("runs").exists()
  subprocess.run(["bash", "-c", capsys.readouterr().out], check=True)
  assert clients.calls() == done
  assert [file.read_text() for file in files] == texts


def test_the_calls_are_these(clients):
  run = ("-m", "experiments.run", "--config=quickstart.py")
  pod = [*("--accelerator=v5litepod-16", "--create", "--spot"), "--extra=--internal-ip"]
  assert _launch("gcloud", *run, flags=pod) == 0
  tpu_vm = ["gcloud", "compute", "tpus", "tpu-vm"]
  where = ["--zone=us-west4-a", "--quiet"]
  create, scp, ssh = clients.calls()
  assert create == [
    *(*tpu_vm, "create", "job", *where, "--accelerator-type=v5litepod-16"),
    *("--version=v2-alpha-tpuv5-lite", "--spot", ""),
  ]
  everywhere = [*where, "--worker=all", "--internal-ip", ""]
  sent = "runs/launch/job.tar.gz"
  assert scp == [*tpu_vm, "scp", sent, "job:lorax_flax.tar.gz", *everywhere]
  assert ssh[:6] + ssh[7:] == [*tpu_vm, "ssh", "job", *everywhere]
  assert ssh[6].startswith("--command=mkdir -p lorax_flax && cd lorax_flax && ")
  line = "-m experiments.run --config=quickstart.py --distributed"
  assert ssh[6].endswith(f" && exec .venv/bin/python {line}")

  job = [*("--nodes=4", "--gpus-per-node=8", "--time=1:00:00"), "--extra=--qos=low"]
  assert _launch("slurm", *run, flags=job) == 0
  (sbatch,) = clients.calls()
  assert sbatch[:-1] == [
    *("sbatch", "--job-name=job", "--nodes=4", "--ntasks-per-node=8"),
    *("--gpus-per-node=8", "--time=1:00:00", "--requeue", "--open-mode=append"),
    *("--signal=TERM@120", "--qos=low"),
  ]
  assert f"\nsrun --kill-on-bad-exit=0 {sys.executable} {line}\n" in sbatch[-1]

  assert _launch("xpk", *run, flags=["--max-restarts=3", "--zone=us-east5-a"]) == 0
  assert clients.calls() == [
    [
      *("xpk", "workload", "create", "--cluster=pods", "--workload=job"),
      *("--tpu-type=v6e-16", "--num-slices=1", "--zone=us-east5-a"),
      *("--docker-image=ours", "--max-restarts=3"),
      *("--termination-grace-period-seconds=120", f"--command=exec python {line}", ""),
    ]
  ]

  managed = ["--managed", "--max-restarts=2", "--accelerators=H100:8", "--nodes=4"]
  assert _launch("sky", *run, flags=managed) == 0
  assert clients.calls() == [
    [
      *("sky", "jobs", "launch", "--name", "job", "--yes", "--detach-run"),
      *("runs/launch/job.yaml", ""),
    ]
  ]
  task = yaml.safe_load(Path("runs/launch/job.yaml").read_text())
  assert task["resources"] == {
    "accelerators": "H100:8",
    "job_recovery": {"max_restarts_on_errors": 2, "recover_on_exit_codes": [143]},
  }
  assert task["num_nodes"] == 4
  assert "--distributed" not in task["run"]
  # Without it SkyPilot would leave out what git ignores.
  assert Path("runs/launch/job/.skyignore").is_file()
  assert _launch("sky", *run, flags=["--accelerators=tpu-v5litepod-16", "--down"]) == 0
  assert clients.calls()[0][:5] == ["sky", "launch", "--cluster", "job", "--down"]
  task = yaml.safe_load(Path("runs/launch/job.yaml").read_text())
  assert task["run"] == f"exec .venv/bin/python {line}\n"


def test_a_run_that_says_whether_to_join_is_left_alone(clients):
  for flag in ("--nodistributed", "--distributed=true", "-distributed"):
    assert _launch("slurm", "-m", "experiments.run", flag) == 0
    assert f"-m experiments.run {flag}\n" in clients.calls()[0][-1]
  assert _launch("slurm", "-m", "experiments.predict") == 0
  assert "distributed" not in clients.calls()[0][-1]


def test_a_clients_failure_ends_the_launch_with_its_code(clients):
  clients.recorder("gcloud", code=7)
  flags = ["--create", "--accelerator=v4-8"]
  assert _launch("gcloud", "-c", "", flags=flags) == 7
  (call,) = clients.calls()
  assert call[4] == "create"


@pytest.mark.parametrize("name", engines.ENGINES)
def test_a_client_that_is_not_there_is_named_before_anything_is_done(
  name, clients, monkeypatch, capsys
):
  monkeypatch.setenv("PATH", os.path.dirname(shutil.which("tar") or ""))
  monkeypatch.setattr(
    shutil, "which", lambda program: None if program in CLIENTS.values() else program
  )
  assert _launch(name, "-c", "") == 1
  said = capsys.readouterr().err
  assert said.startswith(f"error: {CLIENTS[name]} is not on the PATH: ")
  assert ("install" in said) != (name == "slurm")
  assert not Path("runs").exists()


def test_own_files_are_sent_along(clients, tmp_path, capsys):
  Path("mine").mkdir()
  Path("mine/config.py").write_text("# mine")
  flags = ["--send=mine/config.py", f"--setup={_LINK}"]
  read = ["-c", "print(open('mine/config.py').read())"]
  assert _launch("gcloud", *read, flags=flags) == 0
  assert _there("gcloud", clients.calls(), tmp_path) == "# mine\n"
  assert _launch("gcloud", "-c", "", flags=["--send=mine/none.py"]) == 1
  assert "--send=mine/none.py: give a file or folder below" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("name", "flags", "message"),
  [
    ("slurm", ["--name=My_Job"], "--name=My_Job: small letters"),
    ("slurm", ["--name=a", "--nodes=0"], "--nodes must be at least 1, not 0"),
    ("slurm", ["--name=a", "--warn=-1"], "--warn must be at least 0, not -1"),
    ("slurm", ["--name=a", "--env=A"], "--env=A: write it as NAME=VALUE"),
    ("gcloud", ["--name=a", "--zone=z", "--create"], "--create needs --accelerator"),
    ("gcloud", ["--name=a", "--zone=z", "--spot"], "--spot has no effect without"),
    (
      "gcloud",
      ["--name=a", "--zone=z", "--create", "--accelerator=v9-8"],
      "give its --runtime too. Known accelerators are v2, v3,",
    ),
    (
      "xpk",
      ["--name=a", "--cluster=c", "--tpu-type=t", "--image=i", "--base-image=b"],
      "give --image or --base-image, not both",
    ),
    ("sky", ["--name=a", "--max-restarts=1"], "--max-restarts has no effect without"),
    ("sky", ["--name=a", "--managed", "--down"], "--down has no effect with --managed"),
    (
      "sky",
      ["--name=a", "--accelerators=tpu-v4-8", "--nodes=2"],
      "TPU slices do not form one run",
    ),
  ],
)
def test_a_mistake_is_one_message(name, flags, message, clients, capsys):
  assert _main(name, *flags, "--print", "--", "-c", "") == 1
  assert capsys.readouterr().err.startswith("error: ")
  assert _main(name, *flags, "--", "-c", "") == 1
  assert message in capsys.readouterr().err
  assert clients.calls() == []


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--name=a"], "nothing to run"),
    (["--", "-c", ""], "the following arguments are required: --name"),
    (["--name=a", "--nods=2", "--", "-c", ""], "unrecognized arguments: --nods=2"),
    (["--name=a", "--nodes=two", "--", "-c", ""], "invalid int value: 'two'"),
  ],
)
def test_a_flag_that_is_none_is_named(arguments, message, capsys):
  with pytest.raises(SystemExit) as error:
    _main("slurm", *arguments)
  assert error.value.code == 2
  assert message in capsys.readouterr().err


def test_a_line_break_in_an_argument_is_refused(clients):
  with pytest.raises(LoraxError, match="a line break or a control character in 'a"):
    engines.ENGINES["slurm"].render(["-c", "a\nb"], _options("slurm"))


def _options(name, **more):
  needed = {"gcloud": {"zone": "z"}, "xpk": {"cluster": "c", "tpu_type": "t"}}
  return engines.ENGINES[name].options(name="job", **needed.get(name, {}), **more)


@pytest.mark.parametrize("name", engines.ENGINES)
def test_other_programs_submit_through_the_table(name, clients):
  assert cluster.submit(engines.ENGINES[name], ["-c", ""], _options(name)) == 0
  assert {call[0] for call in clients.calls()} == {CLIENTS[name]}


@pytest.mark.parametrize("name", engines.ENGINES)
def test_help_shows_the_docstring_and_every_flag(name, capsys):
  with pytest.raises(SystemExit) as error:
    _main(name, "--help")
  assert error.value.code == 0
  said = capsys.readouterr().out
  assert f"usage: python -m launch.{name} --name=NAME" in said
  assert "-m experiments.run --config=quickstart.py" in said
  for flag in ("--print", "--env", "--extra"):
    assert flag in said


def test_code_is_installed_once(clients, monkeypatch):
  clients.recorder("python3")
  line = project.install("tpu,gcs")
  subprocess.run(["bash", "-c", f"{line} && touch installed"], check=True)
  pip, venv, install = clients.calls()
  assert pip[1:4] == ["-m", "pip", "install"]
  assert venv[1:4] == ["-m", "uv", "venv"]
  assert install[1:5] == ["-m", "uv", "pip", "install"]
  assert ".[tpu,gcs]" in install
  assert Path("installed").exists()
  _venv(Path())
  subprocess.run(["bash", "-c", line], check=True)
  assert clients.calls() == []
  shutil.rmtree(".venv")
  clients.recorder("python3", code=3)
  assert (
    subprocess.run(["bash", "-c", f"{line} && echo on"], check=False).returncode == 3
  )
  assert len(clients.calls()) == 1

"""Names of models: folders, aliases, the hub and its cache, and what goes wrong."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorax_flax.errors import LoraxError
from lorax_flax.hub import assets
from lorax_flax.hub.resolve import resolve


@pytest.fixture
def model(tmp_path):
  folder = tmp_path / "model"
  folder.mkdir()
  (folder / "config.json").write_text("{}")
  (folder / "model.safetensors").write_bytes(b"")
  return folder


def _elsewhere(spec, tmp_path, **environment):
  """resolve in a process of its own: the hub's client reads these variables once."""
  code = (
    "import sys\n"
    "from lorax_flax.errors import LoraxError\n"
    "from lorax_flax.hub.resolve import resolve\n"
    "try: print(resolve(sys.argv[1]))\n"
    "except LoraxError as error: sys.exit(f'error: {error}')\n"
  )
  root = Path(__file__).parents[2]
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", code, spec],
    env={
      **os.environ,
      "HF_HOME": str(tmp_path / "hf"),
      "PYTHONPATH": str(root),
      **environment,
    },
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  # Seconds, not the minutes of retries; with room for a busy machine.
  assert time.monotonic() - start < 60
  assert "Traceback" not in done.stderr
  return done


def _cached(tmp_path, name, files):
  """What the hub's client leaves in its cache for `name`."""
  repo = tmp_path / "hf/hub" / f"models--{name.replace('/', '--')}"
  snapshot = repo / "snapshots/0123456789012345678901234567890123456789"
  snapshot.mkdir(parents=True)
  (repo / "refs").mkdir()
  (repo / "refs/main").write_text(snapshot.name)
  for file in files:
    (snapshot / file).write_text("{}")
  return snapshot


def test_an_existing_folder_is_itself(model):
  assert resolve(str(model)) == model


def test_an_alias_of_an_asset_is_its_folder(model, monkeypatch):
  monkeypatch.setattr(assets, "path", {"minilm": model}.__getitem__)
  assert resolve("minilm") == model


def test_a_mistyped_path_names_the_folder_beside_it(model):
  with pytest.raises(LoraxError, match=f"did you mean {model}"):
    resolve(str(model.parent / "modle"))


def test_a_mistyped_parent_names_the_folder_beside_it(model):
  with pytest.raises(LoraxError, match=f"did you mean {model}"):
    resolve(str(model.parent / "modle/deeper/still"))


def test_a_folder_without_a_config_says_what_it_holds(model):
  (model / "config.json").unlink()
  with pytest.raises(LoraxError, match=r"no config\.json.*holds: model\.safetensors"):
    resolve(str(model))


def test_a_folder_without_weights_says_what_it_holds(model):
  (model / "model.safetensors").rename(model / "pytorch_model.bin")
  with pytest.raises(LoraxError, match=r"no weights.*pickles.*pytorch_model\.bin"):
    resolve(str(model))


def test_an_adapter_is_not_taken_for_a_model(model):
  (model / "config.json").rename(model / "adapter_config.json")
  with pytest.raises(LoraxError, match="a PEFT adapter, not a model"):
    resolve(str(model))


def test_a_file_is_an_error(model):
  with pytest.raises(LoraxError, match="is a file"):
    resolve(str(model / "config.json"))


def test_offline_and_not_cached_names_what_was_wanted_and_what_is_here(tmp_path):
  done = _elsewhere("org/some-model", tmp_path, HF_HUB_OFFLINE="1")
  assert done.returncode == 1
  for words in ("'org/some-model'", "HF_HUB_OFFLINE", "--config.model.path", "minilm"):
    assert words in done.stderr


def test_a_refused_connection_is_said_within_seconds(tmp_path):
  done = _elsewhere("org/some-model", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
  assert done.returncode == 1
  assert "refused" in done.stderr
  assert "'org/some-model'" in done.stderr


def test_a_host_that_never_answers_is_given_up_within_seconds(tmp_path):
  with socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))
    silent.listen(8)
    endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
    done = _elsewhere("org/some-model", tmp_path, HF_ENDPOINT=endpoint)
  assert done.returncode == 1
  assert "'org/some-model'" in done.stderr


@pytest.mark.parametrize(
  "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_a_cached_model_needs_no_network(tmp_path, environment):
  snapshot = _cached(tmp_path, "org/some-model", ["config.json", "model.safetensors"])
  done = _elsewhere("org/some-model", tmp_path, **environment)
  assert done.stdout.strip() == str(snapshot), done.stderr


def test_a_mistyped_alias_names_the_alias(tmp_path):
  done = _elsewhere("minilmm", tmp_path, HF_HUB_OFFLINE="1")
  assert "Did you mean the alias minilm" in done.stderr


def test_a_name_that_the_hub_could_not_have_lists_the_aliases(tmp_path):
  done = _elsewhere("not a name", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
  assert "no valid name on the hub" in done.stderr
  assert "roberta_base" in done.stderr

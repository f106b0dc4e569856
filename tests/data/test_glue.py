"""GLUE's files, prepared in TFDS's form and read back; and with no network."""

import http.server
import json
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from lorax_flax.data import glue, glue_tsv, load, tasks
from lorax_flax.errors import LoraxError
from tests.data import conftest

GLUE = sorted(n for n, t in tasks.TASKS.items() if t.source == "glue")
COUNTS = {"rte": (2490, 277), "mrpc": (3668, 408), "cola": (8551, 1043)}


@pytest.mark.real_data
@pytest.mark.parametrize("name", sorted(COUNTS))
def test_the_real_files_give_the_published_counts(name, glue_archive, cache):
  splits = load.load(name, glue_dir=glue_archive)
  assert (len(splits.train), len(splits.evaluation["validation"])) == COUNTS[name]


@pytest.mark.real_data
def test_the_real_rte_reads_as_it_is_written(glue_archive, cache):
  splits = load.load("rte", glue_dir=glue_archive)
  lines = (glue_archive / "RTE/dev.tsv").read_text("utf-8").split("\n")[1:-1]
  names = tasks.get("rte").labels
  assert [
    "\t".join([str(i), e["text"], e["text_pair"], names[e["label"]]])
    for i, e in enumerate(splits.evaluation["validation"])
  ] == lines


@pytest.mark.real_data
def test_the_real_sst2_has_every_row(glue_archive):
  task = tasks.get("sst2")
  files = glue_tsv.files(task, glue_archive)
  counts = {s: sum(1 for _ in glue_tsv.read(task, s, f)) for s, f in files.items()}
  assert counts == {"train": 67349, "validation": 872}


@pytest.mark.parametrize("name", GLUE)
def test_every_task_is_prepared_and_read_back(name, write_task, cache):
  splits = load.load(name, glue_dir=write_task(name))
  task, (text_columns, label_column) = tasks.get(name), conftest.COLUMNS[name]
  for split, examples in {task.train: splits.train, **splits.evaluation}.items():
    file = glue_tsv.LAYOUTS[name].file(split)
    header = conftest.HEADERS[name][file]
    at = {column: header.index(column) for column in (*text_columns, label_column)}
    wanted = []
    for row in conftest.rows(name, file, 7):
      texts = [row[at[column]] for column in text_columns] + [None]
      label = row[at[label_column]]
      if task.regression:
        label = float(label)
      else:
        label = task.labels.index(label) if label in task.labels else int(label)
      wanted.append({"text": texts[0], "text_pair": texts[1], "label": label})
    assert list(examples) == wanted
    assert {type(e["label"]) for e in examples} == {float if task.regression else int}


def test_prepared_data_is_plain_tfds_that_a_fresh_process_reads_without_tensorflow(
  write_task, cache
):
  load.load("rte", glue_dir=write_task("rte"))
  (root,) = cache.glob("glue/rte-*")
  program = (
    "import sys, tensorflow_datasets as tfds, tensorflow_datasets.text.glue\n"
    f"s = tfds.data_source('glue/rte', data_dir={str(root)!r}, download=False)\n"
    "print(sorted((k, len(v)) for k, v in s.items()), 'tensorflow' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "[('train', 7), ('validation', 7)] False"


def test_loading_never_imports_tensorflow(write_task, cache):
  load.load("rte", glue_dir=write_task("rte"))
  assert "tensorflow" not in sys.modules


def test_a_test_split_that_is_there_is_prepared_without_labels(write_task, cache):
  task, root = tasks.get("stsb"), write_task("stsb")
  builder = glue._from_tsv(task, glue_tsv.files(task, root))
  rows = builder.as_data_source("test")
  assert sorted(row["label"] for row in rows) == [-1.0] * 7


def test_data_is_prepared_once(write_task, cache, monkeypatch):
  root = write_task("rte")
  load.load("rte", glue_dir=root)
  monkeypatch.setattr(glue, "_prepare", None)
  assert len(load.load("rte", glue_dir=root).train) == 7


def test_changed_files_are_prepared_anew(write_task, cache):
  assert len(load.load("rte", glue_dir=write_task("rte", 7)).train) == 7
  assert len(load.load("rte", glue_dir=write_task("rte", 9)).train) == 9


def test_a_half_written_preparation_is_not_taken_for_data(write_task, cache):
  root, task = write_task("rte"), tasks.get("rte")
  digest = glue._digest(glue_tsv.files(task, root))
  (cache / "glue/.preparing-dead/glue/rte/2.0.0").mkdir(parents=True)
  assert not (cache / f"glue/rte-{digest}").exists()
  assert len(load.load("rte", glue_dir=root).train) == 7


def test_a_malformed_file_leaves_nothing_prepared(write_task, cache):
  root = write_task("rte")
  dev = root / "RTE/dev.tsv"
  dev.write_text(dev.read_text() + "one\ttwo\n")
  for _ in range(2):
    with pytest.raises(LoraxError, match=r"dev\.tsv:9: .*4 columns"):
      load.load("rte", glue_dir=root)
  assert [p.name for p in (cache / "glue").iterdir()] == ["rte.lock"]


@pytest.mark.parametrize("locked", [True, False])
def test_processes_that_prepare_at_once_all_read_the_same(write_task, cache, locked):
  root = write_task("rte", 200)
  # Without the lock, as on some network file systems, the renames race.
  lock = "" if locked else "glue.fcntl.flock = lambda *_: None\n"
  program = (
    "from lorax_flax.data import glue, load\n"
    + lock
    + f"s = load.load('rte', glue_dir={str(root)!r})\n"
    "print(len(s.train), s.train[199]['text'], len(s.evaluation['validation']))"
  )
  started = [
    subprocess.Popen(
      [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for _ in range(3)
  ]
  answers = [process.communicate(timeout=60) for process in started]
  assert [out.decode().strip() for out, _ in answers] == ['200 sentence1 "199 200'] * 3
  names = sorted(path.name for path in (cache / "glue").iterdir())
  assert len(names) == 2
  assert names[1] == "rte.lock"


def test_a_cache_that_is_a_file_is_an_error(write_task, cache):
  cache.write_text("")
  with pytest.raises(LoraxError, match="LORAX_FLAX_CACHE"):
    load.load("rte", glue_dir=write_task("rte"))


# No network


def _patient(seconds, monkeypatch, tmp_path):
  start = time.monotonic()
  with pytest.raises(LoraxError) as caught:
    load.load("rte", tfds_dir=tmp_path / "tfds")
  assert time.monotonic() - start < seconds
  message = str(caught.value)
  assert "tfds build glue/rte --file_format=array_record" in message
  assert "--config.data.glue_dir=" in message
  assert not (tmp_path / "tfds").exists()
  return message


def _config(name):
  import tensorflow_datasets.text.glue as tfds_glue

  return {c.name: c for c in tfds_glue.Glue.BUILDER_CONFIGS}[name]


def test_a_refused_connection_fails_within_seconds(monkeypatch, tmp_path):
  monkeypatch.setenv("NO_PROXY", "*")
  monkeypatch.setattr(_config("rte"), "data_url", "http://127.0.0.1:9/RTE.zip")
  assert "no connection" in _patient(3, monkeypatch, tmp_path)


def test_a_name_server_that_never_answers_fails_within_seconds(monkeypatch, tmp_path):
  import socket

  def silent(*args, **kwargs):
    time.sleep(20)
    raise socket.gaierror("too late for anyone to hear")

  monkeypatch.setattr(socket, "getaddrinfo", silent)
  assert "no answer" in _patient(8, monkeypatch, tmp_path)


def test_a_server_without_the_file_is_said(monkeypatch, tmp_path, server):
  monkeypatch.setattr(_config("rte"), "data_url", f"{server}/gone.zip")
  assert "answers 404" in _patient(3, monkeypatch, tmp_path)


@pytest.fixture
def server(tmp_path, monkeypatch):
  """A web server of the folder tmp_path/www."""
  (tmp_path / "www").mkdir()

  class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args):
      super().__init__(*args, directory=str(tmp_path / "www"))

    def log_message(self, *args):
      pass

  monkeypatch.setenv("NO_PROXY", "*")
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    thread.join()


def test_what_is_not_prepared_is_downloaded_and_unpacked(
  monkeypatch, tmp_path, server, write_task
):
  root = write_task("cola", 9)
  with zipfile.ZipFile(tmp_path / "www/CoLA.zip", "w") as archive:
    for file in (root / "CoLA").iterdir():
      archive.write(file, f"CoLA/{file.name}")
  monkeypatch.setattr(_config("cola"), "data_url", f"{server}/CoLA.zip")
  with ThreadPoolExecutor() as pool:
    first, second = pool.map(
      lambda _: load.load("cola", tfds_dir=tmp_path / "tfds"), range(2)
    )
  assert len(first.train) == len(first.evaluation["validation"]) == 9
  assert first.train == second.train == load.load("cola", glue_dir=root).train
  assert "tensorflow" not in sys.modules


def test_a_broken_archive_is_an_error_with_advice(monkeypatch, tmp_path, server):
  (tmp_path / "www/RTE.zip").write_bytes(b"no archive")
  monkeypatch.setattr(_config("rte"), "data_url", f"{server}/RTE.zip")
  with pytest.raises(LoraxError, match=r"BadZipFile.*glue_dir"):
    load.load("rte", tfds_dir=tmp_path / "tfds")


def test_data_prepared_in_another_format_is_an_error_with_the_command(
  monkeypatch, tmp_path, write_task
):
  task, tfds_dir = tasks.get("rte"), tmp_path / "tfds"
  files = glue_tsv.files(task, write_task("rte"))
  glue._prepare(task, files, tfds_dir)
  assert len(load.load("rte", tfds_dir=tfds_dir).train) == 7
  (info,) = tfds_dir.glob("glue/rte/*/dataset_info.json")
  info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
  with pytest.raises(LoraxError, match="--file_format=array_record"):
    load.load("rte", tfds_dir=tfds_dir)


def test_a_glue_folder_for_the_headlines_is_an_error(tmp_path):
  with pytest.raises(LoraxError, match="headlines is not a GLUE task"):
    load.load("headlines", glue_dir=tmp_path)

"""GLUE through tensorflow-datasets, as array_record, with no TensorFlow.

TFDS reads and writes array_record without TensorFlow, but unpacks archives with it, and
retries for minutes without a network. So it only reads prepared data, or is given the
files: from a folder of TSVs, or unpacked here from the archive that it fetched.
"""

import contextlib
import fcntl
import hashlib
import io
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import logging

from lorax_flax.data import glue_tsv
from lorax_flax.data import tfds as tfds_data
from lorax_flax.data.examples import Example, Examples, Splits
from lorax_flax.data.tasks import Task
from lorax_flax.errors import LoraxError
from lorax_flax.files import atomic
from lorax_flax.hub import assets

_HINT = f"; {assets.CACHE_VARIABLE}=FOLDER names another place"
# Seconds for the archive's server to answer, name resolution included.
_PATIENCE = 4.0
# Part of the prepared data's key: incremented to prepare again.
_REVISION = 1


def load(
  task: Task, *, glue_dir: str | Path | None = None, tfds_dir: str | Path | None = None
) -> Examples:
  """A GLUE task's examples, in the order of its files.

  Args:
    task: one whose source is "glue".
    glue_dir: a folder of TSVs in the public archive's layout. They are checked, and
      prepared once, in the cache, in TFDS's format; the key is the files' hash.
    tfds_dir: without `glue_dir`: TFDS's folder of prepared data; None is TFDS's default
      ($TFDS_DATA_DIR, else ~/tensorflow_datasets). Missing data is downloaded.

  Raises:
    LoraxError: a malformed or missing file, or missing data that can't be downloaded;
      that is detected within seconds.
  """
  if glue_dir is not None:
    return _read(task, _from_tsv(task, glue_tsv.files(task, glue_dir)))
  builder = _builder(task, tfds_dir)
  if not tfds_data.is_prepared(builder):
    _download(task, builder)
    # A builder reads the prepared data when it is constructed.
    builder = _builder(task, tfds_dir)
  return _read(task, builder)


def _builder(task: Task, data_dir: str | Path | None) -> Any:
  def find(tfds: Any) -> Any:
    import tensorflow_datasets.text.glue as tfds_glue

    # The class itself: look-up by name would search TFDS's full list.
    return tfds_glue.Glue(config=task.name, data_dir=tfds_data.root(data_dir))

  return tfds_data.builder(find)


def _read(task: Task, builder: Any) -> Examples:
  rows = tfds_data.rows(builder, f"glue/{task.name}", _advice(task))

  def examples(split: str) -> list[Example]:
    # TFDS stores rows in the order of a hash; idx is the row in the file.
    found = sorted(rows(split), key=lambda row: row["idx"])
    return [_example(task, row) for row in found]

  return Splits(
    train=examples(task.train),
    evaluation={split: examples(split) for split in task.evaluation},
  )


def _example(task: Task, row: dict[str, Any]) -> Example:
  texts = [row[name].decode("utf-8") for name in task.text]
  return {
    "text": texts[0],
    "text_pair": texts[1] if len(texts) == 2 else None,
    "label": float(row["label"]) if task.regression else int(row["label"]),
  }


# From a folder of TSVs


def _from_tsv(task: Task, files: dict[str, Path]) -> Any:
  home = assets.cache_dir() / "glue"
  root = home / f"{task.name}-{_digest(files)}"
  try:
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home / f"{task.name}.lock"):
      if not tfds_data.is_prepared(_builder(task, root)):
        logging.info("Preparing glue/%s in %s, once", task.name, root)
        _prepare(task, files, root)
  except OSError as error:
    raise LoraxError(
      f"cannot write {home}: {error.strerror or error}{_HINT}"
    ) from error
  return _builder(task, root)


def _digest(files: dict[str, Path]) -> str:
  digest = hashlib.sha256(str(_REVISION).encode())
  for split, file in sorted(files.items()):
    with file.open("rb") as stream:
      digest.update(
        f"{split} {hashlib.file_digest(stream, 'sha256').hexdigest()}".encode()
      )
  return digest.hexdigest()[:16]


def _prepare(task: Task, files: dict[str, Path], root: Path) -> None:
  complete = lambda folder: tfds_data.is_prepared(_builder(task, folder))
  read = lambda _: {
    split: glue_tsv.read(task, split, file) for split, file in files.items()
  }
  with atomic.cached_folder(root, complete, hint=_HINT) as fresh:
    _generate(_builder(task, fresh), read)


def _generate(builder: Any, generators: Callable[[Any], Any]) -> None:
  """Prepares data with TFDS from `generators(download manager)`."""
  import tensorflow_datasets as tfds

  builder._split_generators = generators
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  # TFDS's prints and progress bars would mix with our commands' output.
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(download_config=config, file_format=tfds_data.FORMAT)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
  """One process of this machine at a time; the lock ends with its holder."""
  with file.open("w") as stream:
    fcntl.flock(stream, fcntl.LOCK_EX)
    yield


# From the archive's server


def _download(task: Task, builder: Any) -> None:
  from tensorflow_datasets.core.download import downloader

  url = _url(builder)
  if problem := _unreachable(url):
    raise LoraxError(
      f"glue/{task.name} isn't prepared in {builder.data_path}, and can't be "
      f"downloaded: {problem}. {_advice(task)}"
    )
  logging.info("Downloading glue/%s from %s, once; it may take minutes", task.name, url)
  # Ten tries, its own choice, take 204 s to fail.
  downloader.MAX_RETRIES = 2
  home = Path(builder.data_path).parent
  try:
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home / ".lock"):
      if not tfds_data.is_prepared(builder):
        generators = builder._split_generators
        _generate(builder, lambda manager: generators(_Unpacking(manager)))
  # Any error on the way, of requests, zipfile or TFDS, has the same advice.
  except Exception as error:
    raise LoraxError(
      f"downloading glue/{task.name} from {url} failed: {error!r:.500}. {_advice(task)}"
    ) from error


def _url(builder: Any) -> str:
  import tensorflow_datasets.text.glue as tfds_glue

  # The archive has no MRPC; TFDS puts it together from its source.
  return builder.builder_config.data_url or tfds_glue._MRPC_TRAIN


def _advice(task: Task) -> str:
  folder = glue_tsv.LAYOUTS[task.name].folder
  return (
    f"Either run `tfds build glue/{task.name} --file_format={tfds_data.FORMAT}` on a "
    "machine with network and TensorFlow, and copy its "
    f"~/tensorflow_datasets/glue/{task.name} to the same place here ($TFDS_DATA_DIR "
    "names another); or give the GLUE archive's TSV files: "
    f"--config.data.glue_dir=FOLDER, with {folder}/train.tsv in it"
  )


def _unreachable(url: str) -> str | None:
  """The reason why the server can't be reached, or None, within `_PATIENCE` seconds."""
  import requests

  found: list[str | None] = []

  def request() -> None:
    try:
      answer = requests.head(url, timeout=_PATIENCE, allow_redirects=True)
      found.append(None if answer.ok else f"{url} answers {answer.status_code}")
    except requests.RequestException as error:
      found.append(f"no connection to {url} ({type(error).__name__})")

  # Name resolution has no timeout, so the request runs in a thread that may be
  # abandoned.
  thread = threading.Thread(target=request, daemon=True)
  thread.start()
  thread.join(_PATIENCE)
  return found[0] if found else f"no answer from {url} in {_PATIENCE:g} s"


class _Unpacking:
  """TFDS's download manager, unpacking with zipfile instead of TensorFlow."""

  def __init__(self, manager: Any):
    self.download = manager.download

  def download_and_extract(self, url: str) -> str:
    archive = os.fspath(self.download(url))
    folder = f"{archive}.unpacked"
    with zipfile.ZipFile(archive) as members:
      members.extractall(folder)
    return folder

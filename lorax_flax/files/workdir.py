"""A run's folder, on a disk or in a bucket: its config, which claims it, and files."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorax_flax.errors import LoraxError, listing
from lorax_flax.files import atomic, bucket, strict_json

CONFIG = "config.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
CURVES = "curves.png"
CONFUSION = "confusion.png"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
# The entry of config.json with digests of what the run is made from, by name.
_FINGERPRINTS = "fingerprints"
TENSORBOARD = "tensorboard"


def check(workdir: Path, config: Mapping[str, Any]) -> None:
  """Raises LoraxError where `claim` would, before any work is done."""
  file = workdir / CONFIG
  with bucket.reaching(workdir):
    if workdir.exists() and not workdir.is_dir():
      raise LoraxError(f"{workdir} is a file, and a workdir is a folder")
    if not file.exists():
      return
  there = read_json(file)
  there.pop(_FINGERPRINTS, None)
  if differences := list(_differences(there, _as_json(config))):
    raise LoraxError(
      f"{workdir} holds a run of another config: {'; '.join(differences)}. Choose "
      "another --workdir, or delete that one"
    )


def check_writable(workdir: Path) -> None:
  """Makes the folder and checks that it can be written, before any work is done.

  Raises:
    OSError: the folder can't be written.
    LoraxError: the bucket can't be written.
  """
  with bucket.reaching(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / ".probe"
    write_text(probe, "")
    probe.unlink()


def claim(
  workdir: Path,
  config: Mapping[str, Any],
  fingerprints: Mapping[str, str] | None = None,
) -> None:
  """Makes the folder, or accepts that of a run with the same config, to resume it.

  Args:
    config: nested dicts and JSON values; written to config.json.
    fingerprints: digests of what the run is made from, by name; written there too. A
      folder that has none is resumed.

  Raises:
    LoraxError: the folder holds a run of another config, or one made from something
      else; it names the differences.
  """
  check(workdir, config)
  workdir.mkdir(parents=True, exist_ok=True)
  file, values = workdir / CONFIG, _as_json(config)
  if fingerprints:
    there = read_json(file).get(_FINGERPRINTS) if file.exists() else None
    _check_same(workdir, there or fingerprints, fingerprints)
    values |= {_FINGERPRINTS: dict(fingerprints)}
  write_json(file, values)


def _check_same(workdir: Path, there: Mapping[str, str], here: Mapping[str, str]):
  names = [n for n in there.keys() | here.keys() if there.get(n) != here.get(n)]
  if names:
    raise LoraxError(
      f"{workdir} holds a run whose {listing(names)} was not the same: the content has "
      "changed under its name since that run started. Put it back, or choose another "
      "--workdir"
    )


def result(workdir: Path) -> dict[str, Any] | None:
  """The result of a finished run, or None."""
  file = workdir / RESULT
  with bucket.reaching(file):
    return read_json(file) if file.exists() else None


def write_json(file: Path, value: Any) -> None:
  """Writes indented JSON, all of it or nothing; see `strict_json.dump`."""
  write_text(file, strict_json.dump(value, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
  """Writes a text, all of it or nothing."""
  write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
  """Writes a file, all of it or nothing."""
  with atomic.new_file(file) as stream:
    stream.write(content)


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config after a round trip through JSON: tuples become lists."""
  return json.loads(json.dumps(config))


def read_json(file: Path) -> dict[str, Any]:
  """Reads an object from a JSON file. Damaged: LoraxError."""
  try:
    value = json.loads(file.read_text("utf-8"))
  except ValueError as error:
    raise LoraxError(f"{file} is not JSON: {error}") from error
  if not isinstance(value, dict):
    raise LoraxError(f"{file} holds no JSON object")
  return value


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
  if isinstance(there, dict) and isinstance(here, dict):
    for key in sorted(there.keys() | here.keys()):
      path = f"{name}.{key}" if name else key
      yield from _differences(there.get(key), here.get(key), path)
  elif there != here:
    yield f"{name} is {json.dumps(there)} there and {json.dumps(here)} here"

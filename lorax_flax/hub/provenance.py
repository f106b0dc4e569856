"""The file beside an adapter that says what it was made from: provenance.json.

Other programs ignore it. Its fields:

  format    1
  base      "name" of the base; "quant" and "param_dtype", as of `registry.load`;
            "weights": by bare checkpoint key the "dtype", "shape", "sha256" of all
            numbers and "sample", of blocks of them (`lorax_flax.hub.checkpoints
            .digests`). A weight that the adapter brings in full is not there.
  plan      "config", the LoraConfig; "deltas": by path the "method", "rank", "scale"
            and the shapes of its "arrays", as they were trained
  inputs    SHA-256 of the rows of each split ("data.train", …) and the tokenizer
  seed      of batches, dropout and new weights
  versions  of the libraries
  probe     "logits" of the adapted model: at most 256 of them, at equal distances, of
            "shape", for fixed random inputs (`lorax_flax.jobs.receipt.probe`)
  files     SHA-256 of the adapter's other files; its README.md is a person's to edit

It is no signature: who can change the adapter can change the file too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax_flax.errors import LoraxError
from lorax_flax.files import atomic, digests, strict_json
from lorax_flax.hub.checkpoints import digests as checkpoint_digests
from lorax_flax.hub.checkpoints.load import Found

FILE = "provenance.json"
# Records of weights by bare checkpoint key; see above.
Weights = Mapping[str, Mapping[str, Any]]

_FORMAT = 1
_PARTS = ("base", "plan", "inputs", "versions", "probe", "files")


@dataclass(frozen=True)
class Differences:
  """Bare keys of the recorded weights that are otherwise in a checkpoint.

  Attributes:
    numbers: of another shape, or of other numbers.
    dtypes: stored in another dtype, and so not compared.
    absent: not there: a weight that the checkpoint lacks or stores in other parts.
  """

  numbers: tuple[str, ...]
  dtypes: tuple[str, ...]
  absent: tuple[str, ...]


def write(folder: Path, content: Mapping[str, Any]) -> None:
  """Writes the file of an adapter whose other files are all in the folder."""
  about = {"format": _FORMAT, **content, "files": _files(folder)}
  (folder / FILE).write_text(f"{strict_json.dump(about, indent=1)}\n", "utf-8")


def read(folder: str | Path) -> dict[str, Any] | None:
  """The content of an adapter's file; None: it has none.

  Raises:
    LoraxError: a file that `write` does not write.
  """
  file = Path(folder).expanduser() / FILE
  if not file.is_file():
    return None
  about = strict_json.read_object(file)
  if about.get("format") != _FORMAT:
    form = about.get("format")
    raise LoraxError(f"{file}: its format is {form!r}; {_FORMAT} is read here")
  try:
    weights = about["base"]["weights"]
    whole = all(isinstance(about[name], dict) for name in _PARTS) and all(
      {"dtype", "shape", "sha256", "sample"} <= weight.keys()
      for weight in weights.values()
    )
  except (KeyError, TypeError, AttributeError):
    whole = False
  if not whole:
    raise LoraxError(f"{file} is damaged: it lacks fields; {FILE} can be deleted")
  return about


def changed_files(folder: Path, about: Mapping[str, Any]) -> list[str]:
  """Names of the adapter's files that are gone, or not as they were written."""
  now = _files(folder)
  return sorted(n for n, digest in about["files"].items() if now.get(n) != digest)


def full(found: Found) -> Weights:
  """The records of a checkpoint's weights with the "sha256" of all their numbers."""
  return _records(found, "sha256", checkpoint_digests.full)


def sampled(found: Found) -> Weights:
  """The records of a checkpoint's weights with the digest of a "sample" of each."""
  return _records(found, "sample", checkpoint_digests.sampled)


def compare(about: Mapping[str, Any], weights: Weights) -> Differences:
  """Compares the recorded weights of a base with those of a checkpoint.

  Args:
    weights: of the checkpoint, by `full` or by `sampled`.
  """
  recorded = about["base"]["weights"]
  differ = {
    key: {name for name, value in weights[key].items() if recorded[key][name] != value}
    for key in recorded
    if key in weights
  }
  # Numbers of another dtype have another digest, and may be the same.
  dtypes = {
    key for key, names in differ.items() if "dtype" in names and "shape" not in names
  }
  return Differences(
    tuple(sorted(key for key, names in differ.items() if names and key not in dtypes)),
    tuple(sorted(dtypes)),
    tuple(sorted(recorded.keys() - weights.keys())),
  )


def _records(
  found: Found, field: str, digest: Callable[[Found], Mapping[str, str]]
) -> Weights:
  digests = digest(found)
  kinds = checkpoint_digests.kinds(found)
  return {key: {**kind, field: digests[key]} for key, kind in kinds.items()}


def _files(folder: Path) -> dict[str, str]:
  aside = (FILE, atomic.README, atomic.MANIFEST)
  return {n: x for n, x in digests.of_folder(folder).items() if n not in aside}

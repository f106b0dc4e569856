"""Digests of files."""

import hashlib
from pathlib import Path


def of_folder(folder: Path) -> dict[str, str]:
  """SHA-256 of each file below a folder, by its name in the folder."""
  found = {}
  for file in sorted(path for path in folder.rglob("*") if path.is_file()):
    with file.open("rb") as stream:
      digest = hashlib.file_digest(stream, "sha256").hexdigest()
    found[file.relative_to(folder).as_posix()] = digest
  return found

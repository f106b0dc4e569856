"""A user's images: folders whose names are the classes, or a file with their paths."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from lorax_flax.data.own import splits
from lorax_flax.data.own.splits import EVALUATION, TRAIN
from lorax_flax.data.own.table import FORMATS, Bad, Row, Table, sorted_out
from lorax_flax.errors import LoraxError, listing, unknown

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def read_splits(
  path: str, held_out: float, *, skip: bool = False
) -> Mapping[str, Table]:
  """Tables of paths and labels, by the split's name, "train" first.

  Args:
    path: a folder with a folder of each class, of which a share is held out; one with
      such folders in train/ and validation/ or test/; or what `splits.read_splits`
      reads.
    held_out: as of `splits.read_splits`. A row goes by its path and its class.
    skip: as of `table.read`; a file that is no image by its ending is such a row.

  Raises:
    LoraxError: no such folder, one without images, a file that is no image by its
      ending, a split that is missing; what `splits.read_splits` raises.
  """
  source = Path(path).expanduser()
  if not source.is_dir() or any(
    file.suffix.lower() in FORMATS for file in source.iterdir()
  ):
    return splits.read_splits(path, held_out, skip=skip)
  names = {folder.name.lower(): folder for folder in _folders(source)}
  if not names:
    there = listing([each.name for each in source.iterdir()]) or "nothing"
    raise LoraxError(
      f"{source} has neither folders of images, one for each class, nor a file of "
      f"paths and labels; there is: {there}"
    )
  if TRAIN not in names:
    return splits.hold_out(_of_classes(source, skip), held_out)
  found = {TRAIN: _of_classes(names.pop(TRAIN), skip)}
  for name, folder in names.items():
    if name not in EVALUATION:
      raise LoraxError(f"{source}: {unknown('split', folder.name, EVALUATION)}")
    if EVALUATION[name] in found:
      raise LoraxError(f"{source}: two folders are {EVALUATION[name]}")
    found[EVALUATION[name]] = _of_classes(folder, skip)
  if len(found) == 1:
    raise LoraxError(f"{source} has no folder validation or test beside {TRAIN}")
  return found


def folder_of(table: Table) -> Path:
  """The folder that a table's paths start from."""
  return table.file if table.file.is_dir() else table.file.parent


def _folders(folder: Path) -> list[Path]:
  visible = (each for each in folder.iterdir() if not each.name.startswith("."))
  return sorted(each for each in visible if each.is_dir())


def _of_classes(folder: Path, skip: bool) -> Table:
  found = (row for each in _folders(folder) for row in _of_class(folder, each))
  rows, bad = sorted_out(folder, found, skip)
  if not rows:
    raise LoraxError(f"{folder} has no folders of images, one for each class")
  return Table(folder, ("image", "label"), rows, bad)


def _of_class(root: Path, folder: Path) -> Iterator[Row | Bad]:
  empty = True
  for file in sorted(folder.rglob("*")):
    if file.is_dir() or file.name.startswith("."):
      continue
    empty, name = False, file.relative_to(root).as_posix()
    if file.suffix.lower() in ENDINGS:
      yield Row(name, {"image": name, "label": folder.name})
    else:
      yield Bad(name, f"is no image: {unknown('ending', file.suffix, ENDINGS)}")
  if empty:
    raise LoraxError(f"{folder} is a class without images")

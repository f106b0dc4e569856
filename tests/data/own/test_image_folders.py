"""A user's images, by folders of classes: their splits, and what can't be read."""

import pytest

from lorax_flax.data.own import image_folders
from lorax_flax.errors import LoraxError


def _write(folder, *names):
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()


def _names(table):
  return [(row.values["image"], row.values["label"]) for row in table.rows]


def test_folders_of_splits_hold_folders_of_classes(tmp_path):
  _write(
    tmp_path, "train/b/2.JPG", "train/a/1.png", "train/a/deep/0.png", "val/a/3.webp"
  )
  _write(tmp_path, "train/a/.DS_Store", ".git/x")
  found = image_folders.read_splits(str(tmp_path), 0.1)
  assert [*found] == ["train", "validation"]
  assert _names(found["train"]) == [
    ("a/1.png", "a"),
    ("a/deep/0.png", "a"),
    ("b/2.JPG", "b"),
  ]
  assert _names(found["validation"]) == [("a/3.webp", "a")]
  assert image_folders.folder_of(found["validation"]) == tmp_path / "val"


def test_folders_of_classes_alone_are_split_by_the_paths(tmp_path):
  names = [f"{label}/{i}.png" for label in ("a", "b") for i in range(50)]
  _write(tmp_path, *names)
  found = image_folders.read_splits(str(tmp_path), 0.2)
  train, held_out = (set(_names(found[n])) for n in ("train", "validation"))
  assert not train & held_out
  assert {name for name, _ in train | held_out} == set(names)
  assert 8 <= len(held_out) <= 32
  _write(tmp_path, "c/new.png")
  more = image_folders.read_splits(str(tmp_path), 0.2)
  assert held_out <= set(_names(more["validation"]))
  assert train <= set(_names(more["train"]))


def test_a_file_of_paths_is_read_as_any_other(tmp_path):
  lines = "".join(f"x/{i}.png,a\n" for i in range(30))
  (tmp_path / "my.csv").write_text(f"image,label\n{lines}")
  found = image_folders.read_splits(str(tmp_path / "my.csv"), 0.3)
  assert image_folders.folder_of(found["train"]) == tmp_path
  (tmp_path / "my.csv").rename(tmp_path / "train.csv")
  (tmp_path / "test.csv").write_text(f"image,label\n{lines}")
  assert [*image_folders.read_splits(str(tmp_path), 0.3)] == ["train", "test"]


@pytest.mark.parametrize(
  ("names", "message"),
  [
    ([], "has neither folders of images.*there is: nothing"),
    (["notes.txt"], "has neither folders of images.*there is: notes.txt"),
    (["a/x.png", "a/notes.txt"], r"a/notes\.txt is no image: unknown ending '\.txt'"),
    (["a/x.png", "b/.keep"], "b is a class without images"),
    (["train/a/x.png"], "has no folder validation or test beside train"),
    (["train/a/x.png", "valdation/a/x.png"], "did you mean 'validation'"),
    (["train/a/x.png", "val/a/x.png", "dev/a/x.png"], "two folders are validation"),
    (["train/x.png", "val/a/x.png"], "train has no folders of images"),
    (["a/x.png"], "of its 1 rows none is left for"),
  ],
)
def test_what_is_no_set_of_images_is_named(tmp_path, names, message):
  _write(tmp_path, *names)
  with pytest.raises(LoraxError, match=message):
    image_folders.read_splits(str(tmp_path), 0.5)

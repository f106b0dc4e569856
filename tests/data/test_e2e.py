"""E2E's files and TFDS's, read as the LoRA paper's code has them."""

import csv

import pytest

from lorax_flax.data import e2e
from lorax_flax.errors import LoraxError

ROWS = [
  ("name[Blue Spice], eatType[coffee shop], area[city centre]", "Blue Spice is it."),
  ("name[The Mill], priceRange[more than £30], near[Café Rouge]", "It's in, é."),
  ("name[Blue Spice], eatType[coffee shop], area[city centre]", "A kid-friendly pub!"),
]
# Lines of examples/NLG/data/e2e of github.com/microsoft/LoRA, beside E2E's own.
PAPER = [
  (
    "name[The Mill], eatType[restaurant], food[English], priceRange[more than £30], "
    "customer rating[high], area[city centre], familyFriendly[no], near[Café Rouge]",
    "name : The Mill | Type : restaurant | food : English | price : more than £ 30 | "
    "customer rating : high | area : city centre | family friendly : no | near : Café "
    "Rouge",
  ),
  (
    "name[Alimentum], area[city centre], familyFriendly[no]",
    "name : Alimentum | area : city centre | family friendly : no",
  ),
]
TEXTS = [
  (
    "There is a place in the city centre, Alimentum, that is not family-friendly.",
    "There is a place in the city centre , Alimentum , that is not family - friendly .",
  ),
  (
    "There's a kid-friendly restaurant named 'Aromi'.",
    "There 's a kid - friendly restaurant named ' Aromi ' .",
  ),
]


def write(folder, rows=ROWS, names=("trainset", "devset", "testset_w_refs")):
  folder.mkdir(exist_ok=True)
  for name in names:
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
      csv.writer(stream).writerows([("mr", "ref"), *rows])
  return folder


@pytest.mark.parametrize(("mr", "prompt"), PAPER)
def test_a_prompt_is_the_papers_line(mr, prompt, tmp_path):
  folder = write(tmp_path, [(mr, "It is.")])
  (pair,) = e2e.read("test", path=str(folder), tfds_dir=None)
  assert (pair.prompt, pair.reference) == (prompt, "It is .")


@pytest.mark.parametrize(("raw", "expected"), TEXTS)
def test_marks_of_punctuation_are_words(raw, expected):
  assert e2e.in_words(raw) == expected


def test_references_of_one_prompt_are_together(tmp_path):
  names = ("train", "dev", "test")
  pairs = e2e.read("validation", path=str(write(tmp_path, names=names)), tfds_dir=None)
  groups = e2e.grouped(pairs)
  assert [group.references for group in groups] == [
    ["Blue Spice is it .", "A kid - friendly pub !"],
    ["It 's in , é ."],
  ]
  assert pairs[1].place.endswith("dev.csv: line 3")


def test_rows_are_spread_evenly():
  assert e2e.spread(range(10), 4) == [0, 2, 5, 7]
  assert e2e.spread(range(3), 4) == e2e.spread(range(3), None) == [0, 1, 2]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """TFDS's e2e_cleaned, prepared from a file in the form that it is published in."""
  import tensorflow_datasets as tfds

  from lorax_flax.data.glue import _generate

  root = tmp_path_factory.mktemp("tfds")
  file = write(root / "csv", names=("rows",)) / "rows.csv"
  split = lambda name: tfds.core.SplitGenerator(
    name=name, gen_kwargs={"csv_path": str(file)}
  )
  made = e2e.builder(root)
  _generate(made, lambda _: [split(name) for name in e2e.SPLITS])
  return root


def test_tfds_has_the_same_rows(prepared, tmp_path):
  stored = e2e.read("train", path=None, tfds_dir=str(prepared))
  own = e2e.read("train", path=str(write(tmp_path)), tfds_dir=None)
  assert sorted(pair[1:] for pair in stored) == sorted(pair[1:] for pair in own)


def test_what_cannot_be_read_is_named(tmp_path):
  with pytest.raises(LoraxError, match=r"e2e_cleaned isn't prepared.*tfds build"):
    e2e.read("train", path=None, tfds_dir=str(tmp_path))
  for both in ({"path": None, "tfds_dir": None}, {"path": "x", "tfds_dir": "y"}):
    with pytest.raises(LoraxError, match=r"data\.path\) or TFDS's"):
      e2e.read("train", **both)
  folder = write(tmp_path / "csv", [*ROWS, ("name Blue Spice", "It.")], ("trainset",))
  with pytest.raises(LoraxError, match=r"no testset_w_refs\.csv; there is: trainset"):
    e2e.read("test", path=str(folder), tfds_dir=None)
  with pytest.raises(LoraxError, match=r"line 5: its mr is no list of attributes"):
    e2e.read("train", path=str(folder), tfds_dir=None)
  (folder / "devset.csv").write_text("mr,text\na[b],c\n")
  with pytest.raises(LoraxError, match=r"devset\.csv has no column 'ref'"):
    e2e.read("validation", path=str(folder), tfds_dir=None)


@pytest.mark.real_data
@pytest.mark.parametrize(
  ("split", "rows", "groups"),
  [("train", 42061, 4862), ("validation", 4672, 547), ("test", 4693, 630)],
)
def test_the_real_files_give_the_published_counts(split, rows, groups, real_data):
  pairs = e2e.read(split, path=str(real_data / "e2e"), tfds_dir=None)
  assert (len(pairs), len(e2e.grouped(pairs))) == (rows, groups)

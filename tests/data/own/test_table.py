"""Files of a user's own, read row by row; what is wrong is said of a line."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from lorax_flax.data.own import splits, table
from lorax_flax.errors import LoraxError

ROWS = [
  {"a text": 'quoted, "twice"', "label": "yes"},
  {"a text": "two\nlines\r\nand more", "label": "no"},
  {"a text": "", "label": "日本語 \U0001f600"},
]


def _write(folder, name, content, encoding="utf-8"):
  file = folder / name
  file.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
  return file


def _separated(folder, name, delimiter, end="\n", encoding="utf-8"):
  with (folder / name).open("w", newline="", encoding=encoding) as stream:
    writer = csv.DictWriter(stream, ROWS[0], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
  return folder / name


def test_every_format_gives_the_same_rows(tmp_path):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
  lines = "\n".join(map(json.dumps, ROWS))
  files = [
    _separated(tmp_path, "a.csv", ","),
    _separated(tmp_path, "crlf.csv", ",", "\r\n", "utf-8-sig"),
    _separated(tmp_path, "a.tsv", "\t"),
    tmp_path / "a.parquet",
    _write(tmp_path, "a.jsonl", lines),
    _write(tmp_path, "bom.jsonl", lines, "utf-8-sig"),
    _write(tmp_path, "lines.json", lines),
    _write(tmp_path, "list.json", json.dumps(ROWS)),
  ]
  for file in files:
    found = table.read(file)
    assert [row.values for row in found.rows] == ROWS, file
    assert found.columns == ("a text", "label")


def test_a_rows_place_is_the_line_it_starts_on(tmp_path):
  file = _write(tmp_path, "a.csv", 'a,b\n1,"x\ny"\n\n2,z\n')
  assert [row.place for row in table.read(file).rows] == ["line 2", "line 5"]


def test_a_long_value_is_read_and_the_limit_is_as_before(tmp_path):
  before = csv.field_size_limit()
  long = "x" * 300_000
  found = table.read(_write(tmp_path, "a.csv", f"a,b\n{long},1\n"))
  assert found.rows[0].values["a"] == long
  assert csv.field_size_limit() == before


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.csv", "a,b\n1,2\n3\n", "line 3 has 1 values, and there are 2 columns: a, b"),
    ("a.csv", "a,a\n1,2\n", "the column 'a' is there twice"),
    ("a.csv", "a,\n1,2\n", "column 2 has no name"),
    ("a.csv", "", "a.csv is empty"),
    ("a.csv", "a,b\n", "a.csv has no rows"),
    ("a.csv", 'a,b\n1,2\n3,"x\n', "the row from line 3 on: unexpected end of data"),
    ("a.csv", b"a,b\n1,2\n\xff,3\n", "line 3 is not UTF-8"),
    ("a.tsv", "a\tb\n1\t2\t3\n", "line 2 has 3 values"),
    ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not JSON"),
    ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 is no object"),
    ("a.jsonl", '{"a": 1, "a": 2}\n', "'a' is there twice"),
    ("a.json", '[{"a": 1}, 3]', "row 2 is no object: 3"),
    ("a.parquet", b"PAR1", "cannot read"),
    ("a.txt", "a", r"unknown ending '.txt'.*\.csv"),
    ("a.cvs", "a", "did you mean '.csv'"),
  ],
)
def test_what_is_malformed_is_said_of_its_line(tmp_path, name, content, message):
  with pytest.raises(LoraxError, match=message):
    table.read(_write(tmp_path, name, content))


def _jsonl(folder, name, numbers):
  return _write(folder, name, "".join(f'{{"text": "row {i}"}}\n' for i in numbers))


def test_one_file_is_split_by_its_rows_values(tmp_path):
  def texts(numbers):
    file = _jsonl(tmp_path, "a.jsonl", numbers)
    found = splits.read_splits(str(file), 0.2)
    assert list(found) == ["train", "validation"]
    return [{row.values["text"] for row in part.rows} for part in found.values()]

  train, held_out = texts(range(500))
  assert not train & held_out
  assert 70 < len(held_out) < 130
  # Another order, rows twice, and new rows: each row stays where it was.
  more_train, more_held_out = texts([*reversed(range(500)), *range(700)])
  assert train < more_train
  assert held_out < more_held_out
  assert not more_train & more_held_out


def test_a_folder_has_a_file_for_each_split(tmp_path):
  for name, count in (("validation.csv", 0), ("train.jsonl", 4), ("test.jsonl", 2)):
    _jsonl(tmp_path, name, range(count))
  (tmp_path / "validation.csv").write_text("text\nx\n")
  _write(tmp_path, "notes.txt", "")
  found = splits.read_splits(str(tmp_path), 0.1)
  sizes = {name: len(part) for name, part in found.items()}
  assert sizes == {"train": 4, "validation": 1, "test": 2}


def test_what_a_folder_lacks_is_an_error(tmp_path):
  with pytest.raises(LoraxError, match=r"has no train file of .*there is: nothing"):
    splits.read_splits(str(tmp_path), 0.1)
  _jsonl(tmp_path, "train.jsonl", range(4))
  with pytest.raises(LoraxError, match=r"no validation or test file.*train.jsonl"):
    splits.read_splits(str(tmp_path), 0.1)
  _jsonl(tmp_path, "dev.jsonl", range(4))
  _jsonl(tmp_path, "valid.jsonl", range(4))
  with pytest.raises(
    LoraxError, match=r"both dev.jsonl and valid.jsonl are validation"
  ):
    splits.read_splits(str(tmp_path), 0.1)


def test_a_split_without_rows_is_an_error(tmp_path):
  file = _jsonl(tmp_path, "a.jsonl", range(2))
  with pytest.raises(LoraxError, match="of its 2 rows none is left for validation"):
    splits.read_splits(str(file), 1e-9)

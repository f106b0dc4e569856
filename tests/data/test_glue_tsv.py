"""Malformed files: one clear error with the file and the line."""

import pytest

from lorax_flax.data import glue_tsv, tasks
from lorax_flax.errors import LoraxError

RTE = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n"


def _read(tmp_path, text, name="rte", split="train"):
  file = tmp_path / "train.tsv"
  file.write_bytes(text.encode() if isinstance(text, str) else text)
  return list(glue_tsv.read(tasks.get(name), split, file))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (RTE + "1\tc\tentailment\n", r"train\.tsv:3: .* 4 columns"),
    (RTE + "1\tc\td\tentailment\te\n", r"train\.tsv:3: .* 4 columns"),
    (RTE + "\n" + RTE.splitlines()[1], r"train\.tsv:3: .* 4 columns"),
    (RTE + "1\tc\td\tnot_entailmnt\n", r"train\.tsv:3: .*did you mean 'not_entail"),
    (RTE + "1\tc\td\t2\n", r"train\.tsv:3: unknown label '2'"),
    (RTE + "1\tc\td\t-1\n", r"train\.tsv:3: unknown label '-1'"),
    (RTE + "1\tc\td\t\n", r"train\.tsv:3: unknown label ''"),
    ("", r"train\.tsv:1: unknown column 'sentence1'"),
    (RTE.split("\n")[0] + "\n", r"train\.tsv has no rows"),
    (RTE.replace("label", "labels"), r"unknown column 'label'; did you mean 'labels'"),
    (RTE.encode() + b"1\t\xff\tb\tentailment\n", "UTF-8"),
  ],
)
def test_a_malformed_file_is_an_error_with_its_line(tmp_path, text, message):
  with pytest.raises(LoraxError, match=message):
    _read(tmp_path, text)


@pytest.mark.parametrize("score", ["5.1", "-0.1", "nan", "inf", "", "x"])
def test_a_score_outside_zero_to_five_is_an_error(tmp_path, score):
  text = f"sentence1\tsentence2\tscore\na\tb\t1.5\na\tb\t{score}\n"
  with pytest.raises(LoraxError, match=r"train\.tsv:3: the score"):
    _read(tmp_path, text, "stsb")


def test_cola_without_header_counts_lines_from_its_first_row(tmp_path):
  with pytest.raises(LoraxError, match=r"train\.tsv:1: .*unknown label 'x'"):
    _read(tmp_path, "gj04\tx\t\tA sentence.\n", "cola")
  assert _read(tmp_path, "gj04\t0\t*\tA sentence.", "cola") == [
    (0, {"sentence": "A sentence.", "label": 0, "idx": 0})
  ]


def test_blank_lines_at_the_end_are_passed_over(tmp_path):
  assert len(_read(tmp_path, RTE + "\n\r\n")) == 1


def test_quotation_marks_and_odd_line_ends_are_text(tmp_path):
  text = '"open\x0b\x85\u2028 \r quote'
  (row,) = _read(tmp_path, f"sentence\tlabel\r\n{text}\t1\r\n", "sst2")
  assert row[1] == {"sentence": text, "label": 1, "idx": 0}


def test_a_byte_order_mark_is_no_text(tmp_path):
  (row,) = _read(tmp_path, "\ufeffsentence\tlabel\na\t1\n", "sst2")
  assert row[1]["sentence"] == "a"


QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"


def test_qqps_few_broken_rows_are_left_out(tmp_path):
  good = [f"{i}\t1\t2\ta\tb\t1\n" for i in range(3000)]
  lines = [*good[:1000], "9\t1\t2\tbroken\n", "off\tb\t0\n", *good[1000:]]
  found = _read(tmp_path, QQP + "".join(lines), "qqp")
  assert len(found) == 3000
  assert found[1000][0] == found[1000][1]["idx"] == 1002


def test_many_broken_rows_are_an_error_in_qqp_too(tmp_path):
  good = "0\t1\t2\ta\tb\t1\n"
  with pytest.raises(LoraxError, match=r"train\.tsv:3: .*6 columns"):
    _read(tmp_path, QQP + good + "broken\n" + good * 500, "qqp")


def test_a_missing_task_folder_lists_what_there_is(write_task):
  root = write_task("rte")
  with pytest.raises(LoraxError, match=r"no folder SST-2 .*There are: RTE"):
    glue_tsv.files(tasks.get("sst2"), root)


def test_a_missing_file_is_named_but_a_missing_test_file_is_fine(write_task):
  root = write_task("cola")
  (root / "CoLA/test.tsv").unlink()
  assert set(glue_tsv.files(tasks.get("cola"), root)) == {"train", "validation"}
  (root / "CoLA/dev.tsv").unlink()
  with pytest.raises(LoraxError, match=r"no file .*CoLA/dev\.tsv.*train\.tsv"):
    glue_tsv.files(tasks.get("cola"), root)


def test_a_missing_folder_is_an_error(tmp_path):
  with pytest.raises(LoraxError, match=r"no folder .*nowhere"):
    glue_tsv.files(tasks.get("rte"), tmp_path / "nowhere")

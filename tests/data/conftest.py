"""The tests' data: the real one where it is there, and small files of our own."""

import pytest

from lorax_flax.data import glue_tsv
from lorax_flax.errors import LoraxError
from lorax_flax.hub import assets


@pytest.fixture(scope="session")
def glue_archive(real_data):
  return real_data / "glue"


def _asset(name):
  try:
    return assets.path(name)
  except LoraxError as error:
    pytest.skip(f"no package registry: {error}")


@pytest.fixture(scope="session")
def minilm():
  return _asset("minilm")


@pytest.fixture(scope="session")
def headlines_file():
  return _asset("headlines")


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache."""
  folder = tmp_path / "cache"
  monkeypatch.setenv(assets.CACHE_VARIABLE, str(folder))
  return folder


# Small files in the archive's layouts, as they are published.
_MNLI = (
  "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
  "sentence1_parse sentence2_parse sentence1 sentence2"
)
_MNLI_DEV = f"{_MNLI} label1 label2 label3 label4 label5 gold_label"
_STSB = "index genre filename year old_index source1 source2 sentence1 sentence2"
_COLUMNS = {
  "mnli": {
    "train.tsv": f"{_MNLI} label1 gold_label",
    "dev_matched.tsv": _MNLI_DEV,
    "dev_mismatched.tsv": _MNLI_DEV,
    "test_matched.tsv": _MNLI,
  },
  "sst2": "sentence label",
  "mrpc": "Quality,#1 ID,#2 ID,#1 String,#2 String",
  "cola": {
    "train.tsv": "source is_acceptable mark sentence",
    "dev.tsv": "source is_acceptable mark sentence",
    "test.tsv": "index sentence",
  },
  "qnli": "index question sentence label",
  "qqp": "id qid1 qid2 question1 question2 is_duplicate",
  "rte": "index sentence1 sentence2 label",
  "stsb": {
    "train.tsv": f"{_STSB} score",
    "dev.tsv": f"{_STSB} score",
    "test.tsv": _STSB,
  },
}


def _header(columns):
  return columns.split("," if "," in columns else " ")


# Task -> file -> columns.
HEADERS = {
  task: {file: _header(columns) for file, columns in files.items()}
  if isinstance(files, dict)
  else {file: _header(files) for file in ("train.tsv", "dev.tsv")}
  for task, files in _COLUMNS.items()
}
# Task -> the columns of its texts, and of its label.
COLUMNS = {
  "mnli": (("sentence1", "sentence2"), "gold_label"),
  "sst2": (("sentence",), "label"),
  "mrpc": (("#1 String", "#2 String"), "Quality"),
  "cola": (("sentence",), "is_acceptable"),
  "qnli": (("question", "sentence"), "label"),
  "qqp": (("question1", "question2"), "is_duplicate"),
  "rte": (("sentence1", "sentence2"), "label"),
  "stsb": (("sentence1", "sentence2"), "score"),
}
_LABELS = {
  "mnli": ["neutral", "entailment", "contradiction"],
  "qnli": ["entailment", "not_entailment"],
  "rte": ["entailment", "not_entailment"],
  "stsb": ["5.000", "0.000", "3.250"],
}


def rows(task, file, count):
  """Cells by row: a text cell says its column and row; the other cells are noise."""
  texts, label = COLUMNS[task]
  labels = _LABELS.get(task, ["0", "1"])

  def cell(column, row):
    if column in texts:
      return f'{column} "{row}'
    return labels[row % len(labels)] if column == label else f"x{row}"

  return [[cell(column, row) for column in HEADERS[task][file]] for row in range(count)]


@pytest.fixture
def write_task(tmp_path):
  """write_task(task, count) writes a small archive, and returns its folder."""

  def write(task, count=7):
    root = tmp_path / "glue"
    folder = root / glue_tsv.LAYOUTS[task].folder
    folder.mkdir(parents=True, exist_ok=True)
    for file, header in HEADERS[task].items():
      lines = rows(task, file, count)
      if not (task == "cola" and file != "test.tsv"):
        lines = [header, *lines]
      text = "".join("\t".join(line) + "\n" for line in lines)
      (folder / file).write_text(text, encoding="utf-8")
    return root

  return write

"""The form of a user's rows by their columns."""

import json

import pytest

from lorax_flax.data.own import forms, table
from lorax_flax.errors import LoraxError

ALL = tuple(forms.FORMS)


def _tables(folder, *rows):
  file = folder / "a.jsonl"
  file.write_text("\n".join(map(json.dumps, rows)))
  return {"train": table.read(file)}


def _find(folder, row, columns=None, use=ALL):
  form, found = forms.find(_tables(folder, row), columns or {}, use)
  return form, found["train"].rows[0].values


@pytest.mark.parametrize(
  ("row", "form"),
  [
    ({"messages": [], "tools": [], "id": 3}, "chat"),
    ({"prompt": "a", "completion": "b", "text": "c"}, "completion"),
    ({"text": "a", "label": 1}, "classes"),
    ({"text": "a", "text_pair": "b", "label": "x"}, "classes"),
    ({"text": "a"}, "text"),
    ({"input_ids": [1], "loss_mask": [1]}, "token_ids"),
    ({"image": "a.png", "label": "cat"}, "images"),
  ],
)
def test_a_form_is_found_by_its_columns(tmp_path, row, form):
  found, values = _find(tmp_path, row)
  assert found == form
  assert values == {n: x for n, x in row.items() if n in forms.FORMS[form].columns}


def test_odd_columns_are_renamed(tmp_path):
  row = {"Review Text": "fine", "sentiment": "good", "label": 7}
  columns = {"text": "Review Text", "label": "sentiment"}
  assert _find(tmp_path, row, columns) == ("classes", {"text": "fine", "label": "good"})


@pytest.mark.parametrize(
  ("row", "columns", "use", "message"),
  [
    ({"txt": "a", "label": 1}, {}, ["classes"], "data.columns.text=txt"),
    ({"text": "a"}, {"labl": "text"}, ALL, "did you mean 'label'"),
    ({"text": "a"}, {"label": "txt"}, ALL, "unknown column 'txt'.* 'text'"),
    ({"messages": []}, {}, ["classes"], "messages, which are chats, and this trains"),
    ({"text": None, "label": 1}, {}, ALL, "line 1 has no text"),
    ({"a": 1, "b": 2}, {}, ["classes"], r"no form \(texts with labels: text and label"),
  ],
)
def test_what_fits_no_form_is_an_error(tmp_path, row, columns, use, message):
  with pytest.raises(LoraxError, match=message):
    _find(tmp_path, row, columns, use)


def test_every_split_has_the_columns(tmp_path):
  train = _tables(tmp_path, {"text": "a", "label": 1})["train"]
  (tmp_path / "b").mkdir()
  other = _tables(tmp_path / "b", {"text": "a"})["train"]
  with pytest.raises(LoraxError, match=r"b/a.jsonl has no column 'label'"):
    forms.find({"train": train, "validation": other}, {}, ALL)

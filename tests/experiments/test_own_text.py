"""Runs on chats, completions and documents of one's own, against transformers and PEFT.

The real configs, shrunk; the peer reads the same files with its own tokenizer, its own
chat template and its own masks.
"""

import json
import math
import re
import warnings

import peft
import pytest
import torch
import transformers

from experiments import run
from lorax_flax.errors import LoraxError
from tests.experiments import own_text


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("base")
  return folder, own_text.decoder(folder)


def _chat(tokenizer, rows):
  """By transformers: its template, and its mask of what the assistant says."""
  for row in rows:
    made = tokenizer.apply_chat_template(
      row["messages"],
      chat_template=own_text.TEMPLATE,
      return_dict=True,
      return_assistant_tokens_mask=True,
    )
    yield made["input_ids"], made["assistant_masks"]


def _completion(tokenizer, rows):
  """The prompt's tokens alone, then the full text's, as TRL has it."""
  for row in rows:
    prompt = tokenizer(row["prompt"])["input_ids"]
    text = row["prompt"] + row["completion"] + tokenizer.eos_token
    ids = tokenizer(text)["input_ids"]
    assert ids[: len(prompt)] == prompt
    yield ids, [0] * len(prompt) + [1] * (len(ids) - len(prompt))


def _document(tokenizer, rows):
  for row in rows:
    ids = tokenizer(row["text"] + tokenizer.eos_token)["input_ids"]
    yield ids, [1] * len(ids)


# The config, the rows, the peer's reading of them, and settings.
FORMS = {
  "chat": ("chat.py", own_text.chats, _chat, {}),
  "completion": ("complete.py", own_text.completions, _completion, {}),
  "documents": (
    "complete.py",
    own_text.documents,
    _document,
    {"data.documents": "rows"},
  ),
}


class Trained:
  def __init__(self, form, base, folder):
    (self.base, tokenizer), (spec, rows, read, changes) = base, FORMS[form]
    data = own_text.write(folder / "data", rows)
    lines = (data / "validation.jsonl").read_text().splitlines()
    self.held_out = list(read(tokenizer, map(json.loads, lines)))
    self.settings = own_text.shrunk(spec, self.base, data, **changes)
    self.workdir = folder / "run"
    self.result = run.run(self.settings, self.workdir)


@pytest.fixture(scope="module", params=FORMS)
def trained(request, base, tmp_path_factory):
  return Trained(request.param, base, tmp_path_factory.mktemp(request.param))


def _loss(model, rows):
  total = count = 0.0
  for ids, mask in rows:
    ids, learnt = torch.tensor([ids]), torch.tensor(mask)[1:] == 1
    with torch.no_grad():
      logits = model(input_ids=ids).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    total, count = total + float(losses[learnt].sum()), count + float(learnt.sum())
  return total / count


def test_the_loss_falls(trained):
  model = transformers.AutoModelForCausalLM.from_pretrained(trained.base).eval()
  before = _loss(model, trained.held_out)
  assert trained.result["eval_loss"] < 0.8 * before
  assert trained.result["perplexity"] == pytest.approx(
    math.exp(trained.result["eval_loss"])
  )
  assert trained.result["examples_evaluated"] == 5


def test_the_adapter_has_that_loss_in_peft_on_the_peers_tokens_and_masks(trained):
  model = transformers.AutoModelForCausalLM.from_pretrained(trained.base)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's, about its own options
    model = peft.PeftModel.from_pretrained(model, trained.workdir / "adapter").eval()
  assert _loss(model, trained.held_out) == pytest.approx(
    trained.result["eval_loss"], rel=1e-5
  )


def _prepare(settings, folder):
  return run.prepare({folder: settings})


def _rows(job):
  """The labels of every row that is evaluated, in order."""
  batches = job.data.evaluation["validation"]
  rows = {}
  for batch in batches:
    for i, ids, labels, mask in zip(
      *(batch[n] for n in ("index", "input_ids", "labels", "attention_mask")),
      strict=True,
    ):
      rows[int(i)] = (ids[mask != 0].tolist(), (labels[mask != 0] >= 0).tolist())
  rows.pop(-1, None)
  return [rows[i] for i in sorted(rows)]


def test_a_template_of_ones_own_that_marks_nothing_gives_the_same_masks(base, tmp_path):
  folder, tokenizer = base
  data = own_text.write(tmp_path / "data", own_text.chats)
  file = tmp_path / "own.jinja"
  file.write_text(own_text.UNMARKED)
  changes = {"data.chat_template": str(file)}
  job = _prepare(own_text.shrunk("chat.py", folder, data, **changes), tmp_path)
  expected = list(_chat(tokenizer, own_text.chats(5, 30)))
  assert [(ids, list(map(int, mask))) for ids, mask in _rows(job)] == expected


def test_the_last_turn_alone_can_be_learnt(base, tmp_path):
  folder, tokenizer = base
  data = own_text.write(tmp_path / "data", own_text.chats)
  settings = own_text.shrunk("chat.py", folder, data, **{"data.learn": "last"})
  found = _rows(_prepare(settings, tmp_path))
  for (ids, learnt), (_, mask) in zip(
    found, _chat(tokenizer, own_text.chats(5, 30)), strict=True
  ):
    last = len(mask) - mask[::-1].index(1)
    start = last - mask[:last][::-1].index(0)
    assert learnt == [start <= i < last for i in range(len(ids))]


def test_windows_of_documents_lose_nothing(base, tmp_path):
  folder, tokenizer = base
  data = own_text.write(tmp_path / "data", own_text.documents)
  settings = own_text.shrunk("complete.py", folder, data, **{"data.max_length": 7})
  found = _rows(_prepare(settings, tmp_path))
  stream = [
    i for ids, _ in _document(tokenizer, own_text.documents(5, 30)) for i in ids
  ]
  assert all(len(ids) == 7 for ids, _ in found[:-1])
  # A row's first token is never predicted, and is the one before's last.
  assert found[0][0][:1] + [i for ids, _ in found for i in ids[1:]] == stream
  assert all(all(learnt) for _, learnt in found)


def test_a_single_file_is_split_and_its_columns_renamed(base, tmp_path):
  file = tmp_path / "mine.csv"
  lines = [f'"{n}:"," {said}",x' for n, said in map(own_text.counting, range(9))]
  file.write_text("\n".join(["Frage,Antwort,Rest", *lines * 3, ""]))
  names = {"prompt": "Frage", "completion": "Antwort"}
  changes = {"data.columns": names, "data.held_out": 0.3}
  job = _prepare(own_text.shrunk("complete.py", base[0], file, **changes), tmp_path)
  assert 0 < len(_rows(job)) < 27
  assert all(any(learnt) and not all(learnt) for _, learnt in _rows(job))


def _losses(workdir):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [line["train/loss"] for line in lines if "train/loss" in line]


def test_packed_rows_train_as_they_do_unpacked(base, tmp_path, caplog):
  caplog.set_level("INFO", "lorax_flax")
  data = own_text.write(tmp_path / "data", own_text.chats)
  found = {}
  for packing in (False, True):
    # All rows are in each batch, so that its loss is over the same tokens.
    changes = {"data.packing": packing, "train.batch_size": 18, "train.steps": 3}
    settings = own_text.shrunk("chat.py", base[0], data, **changes)
    workdir = tmp_path / str(packing)
    found[packing] = (run.run(settings, workdir)["eval_loss"], *_losses(workdir))
  assert found[True] == pytest.approx(found[False], rel=1e-5)
  assert found[True][-1] < 0.9 * found[True][1]
  [packed] = re.findall(r"packed: 18 rows in (\d+), of which", caplog.text)
  assert int(packed) == 14


def test_what_was_found_is_shown(base, tmp_path, caplog):
  caplog.set_level("INFO", "lorax_flax")
  data = own_text.write(tmp_path / "data", own_text.chats)
  changes = {"data.packing": True}
  job = _prepare(own_text.shrunk("chat.py", base[0], data, **changes), tmp_path)
  ids, learnt = zip(*_chat(base[1], own_text.chats(18)), strict=True)
  total, some = sum(map(len, ids)), sum(map(sum, learnt))
  lengths = sorted(map(len, [*ids, *(ids for ids, _ in _rows(job))]))
  for line in (
    "chats, of the columns messages; not read: note",
    "rows: 18 in train, 5 in validation",
    f"tokens of a row: {lengths[11]} in the median, {lengths[-1]} in the longest",
    f"learnt: {some} of {total} tokens in train ({some / total:.1%}), which are in",
    "padding: ",
    "packed: 18 rows in ",
    "example: <|start|>user\none<|end|>\n<|start|>assistant\n⟦one two three<|end|>⟧",
  ):
    assert line in caplog.text
  assert caplog.text.count("example: ") == 3


def test_token_ids_are_shown_as_they_are(base, tmp_path, caplog):
  caplog.set_level("INFO", "lorax_flax")
  row = {"input_ids": [5, 6, 7, 8], "loss_mask": [1, 0, 1, 1]}
  data = own_text.write(tmp_path / "data", lambda *_: [row])
  _prepare(own_text.shrunk("complete.py", base[0], data), tmp_path)
  assert "example: 5 6⟦7 8⟧" in caplog.text


BAD = [
  ({"messages": []}, "line 3: its list of messages is empty"),
  ({"messages": [{"role": "user", "content": "x"}]}, "line 3: no message has the role"),
  (
    {"messages": [{"role": "user", "content": "five " * 60}, *own_text.ANSWER]},
    "line 3: no token is predicted: those that are learnt are all cut off",
  ),
  (
    {"messages": [{"role": "user", "content": "\ud800"}, *own_text.ANSWER]},
    "line 3: the text holds '.ud800', half of a surrogate pair",
  ),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_row_that_can_not_be_is_an_error_or_counted(
  base, tmp_path, caplog, row, message
):
  caplog.set_level("INFO", "lorax_flax")
  data = own_text.write(tmp_path / "data", own_text.chats)
  rows = [*own_text.chats(2), row, *own_text.chats(2), row]
  text = "".join(json.dumps(line) + "\n" for line in rows)
  (data / "train.jsonl").write_text(text)
  with pytest.raises(LoraxError, match=rf"train\.jsonl: {message}"):
    _prepare(own_text.shrunk("chat.py", base[0], data), tmp_path)
  changes = {"data.bad_rows": "skip"}
  job = _prepare(own_text.shrunk("chat.py", base[0], data, **changes), tmp_path)
  assert job.data.steps_per_epoch == 1  # the four others
  assert "train.jsonl: 2 rows are skipped: " in caplog.text
  assert "(the first: line 3)" in caplog.text
  assert "not read: note" in caplog.text


def test_rows_that_are_too_long_are_cut_and_counted(base, tmp_path, caplog):
  caplog.set_level("INFO", "lorax_flax")
  data = own_text.write(tmp_path / "data", own_text.documents)
  changes = {"data.documents": "rows", "data.max_length": 8}
  job = _prepare(own_text.shrunk("complete.py", base[0], data, **changes), tmp_path)
  assert max(len(ids) for ids, _ in _rows(job)) == 8
  assert "rows are cut to data.max_length = 8; " in caplog.text


def test_a_line_that_can_not_be_read_is_an_error_or_counted(base, tmp_path, caplog):
  caplog.set_level("INFO", "lorax_flax")
  data = own_text.write(tmp_path / "data", own_text.completions)
  lines = [json.dumps(row) for row in own_text.completions(5)]
  lines[1:1] = ["{", '{"prompt": "a"}', "[]", "{"]
  (data / "train.jsonl").write_text("\n".join(lines))
  with pytest.raises(LoraxError, match=r"train\.jsonl: line 2 is not JSON"):
    _prepare(own_text.shrunk("complete.py", base[0], data), tmp_path)
  changes = {"data.bad_rows": "skip", "train.batch_size": 1}
  job = _prepare(own_text.shrunk("complete.py", base[0], data, **changes), tmp_path)
  assert job.data.steps_per_epoch == 5
  assert "train.jsonl: 2 rows are skipped: is not JSON" in caplog.text
  assert "1 rows are skipped: has no completion (the first: line 3)" in caplog.text
  assert "1 rows are skipped: is no object: [] (the first: line 4)" in caplog.text


def test_most_reasons_are_shown(base, tmp_path, caplog):
  caplog.set_level("INFO", "lorax_flax")
  data = own_text.write(tmp_path / "data", own_text.completions)
  bad = [{"prompt": i, "completion": "x"} for i in (1, 2, 2, 3, 4, 5, 6, 7)]
  lines = [json.dumps(row) for row in [*bad, *own_text.completions(5)]]
  (data / "train.jsonl").write_text("\n".join(lines))
  changes = {"data.bad_rows": "skip"}
  _prepare(own_text.shrunk("complete.py", base[0], data, **changes), tmp_path)
  assert "2 rows are skipped: prompt is a text, not 2 (the first: line 2)" in (
    caplog.text
  )
  assert caplog.text.count("rows are skipped: ") == 5
  assert "train.jsonl: 2 more rows are skipped" in caplog.text


@pytest.mark.parametrize(
  ("rows", "changes", "message"),
  [
    (own_text.chats, {"data.learn": "first"}, "unknown data.learn 'first'.*all, last"),
    (own_text.chats, {"data.held_out": 1.0}, "data.held_out is a share above 0, below"),
    (own_text.chats, {"data.max_length": 1}, "data.max_length must be at least 2"),
    (own_text.chats, {"data.bad_rows": "drop"}, "unknown data.bad_rows 'drop'"),
    (own_text.chats, {"data.documents": "row"}, "data.documents 'row'; did you mean"),
    (
      own_text.chats,
      {"data.columns": {"messages": "notes"}},
      "data.columns.messages: .*unknown column 'notes'; did you mean 'note'",
    ),
    (
      lambda *_: [{"text": "a", "label": "b"}, {"labels": "c", "text": "d"}],
      {"data.columns": {"text": "label"}},
      "line 2 has no text",
    ),
    (
      lambda *_: [{"premise": "a", "label": 1}],
      {},
      "has the columns label, premise, which make no form",
    ),
    (
      lambda *_: [{"input_ids": [1, 2], "loss_masks": [1, 1]}],
      {},
      "line 1: unknown name 'loss_masks'; did you mean 'loss_mask'",
    ),
    (lambda *_: [{"text": ""}], {}, "line 1: text is empty"),
    (
      lambda *_: [{"prompt": 3, "completion": "x"}],
      {},
      "line 1: prompt is a text, not 3",
    ),
  ],
)
def test_what_does_not_fit_is_an_error(base, tmp_path, rows, changes, message):
  data = own_text.write(tmp_path / "data", rows)
  with pytest.raises(LoraxError, match=message):
    _prepare(own_text.shrunk("complete.py", base[0], data, **changes), tmp_path)


def test_a_model_without_a_chat_template_says_how_to_give_one(tmp_path):
  own_text.decoder(tmp_path / "base", template=None)
  data = own_text.write(tmp_path / "data", own_text.chats)
  with pytest.raises(LoraxError, match=r"no chat template in .*Give a \.jinja file"):
    _prepare(own_text.shrunk("chat.py", tmp_path / "base", data), tmp_path)

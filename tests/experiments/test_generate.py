"""The command generate: transformers' texts with PEFT's adapter, line by line."""

import json

import pytest
import torch
import transformers

from experiments.generate import generate
from lorax_flax.errors import LoraxError
from lorax_flax.serve.settings import Decoding
from tests.experiments import commands, peers

TEMPLATE = (
  "{% for m in messages %}<s> {{ m.content }} {% endfor %}"
  "{% if add_generation_prompt %}a man{% endif %}"
)
LINES = [
  {"prompt": "was it a cat i saw"},
  {"messages": [{"role": "user", "content": "no lemon no melon"}]},
  {"input_ids": [0, 7, 9]},
]
NEW = 6


@pytest.fixture(scope="module", params=["llama", "t5"])
def folders(request, tmp_path_factory):
  """A base with a chat template and an adapter of it, and PEFT's model of both."""
  root = tmp_path_factory.mktemp("generate")
  model = peers.tiny(request.param, root / "base")
  if model.config.is_encoder_decoder:
    model.generation_config.decoder_start_token_id = 1
    model.generation_config.save_pretrained(root / "base")
  (root / "base/chat_template.jinja").write_text(TEMPLATE)
  adapted = peers.adapt(model, root / "adapter")
  return root, adapted


def _write(file, lines):
  file.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(file)


def _ours(root, lines, decoding, **options):
  out = root / "out/texts.jsonl"
  source = _write(root / "in.jsonl", lines)
  count = generate(
    str(root / "base"), str(root / "adapter"), source, str(out), decoding, **options
  )
  found = [json.loads(line) for line in out.read_text().splitlines()]
  assert count == len(found)
  return found


@pytest.mark.parametrize("fields", [{}, {"beams": 2, "no_repeat_ngram": 2}], ids=str)
def test_a_files_lines_are_continued_as_by_transformers(folders, fields):
  root, model = folders
  tokenizer = transformers.AutoTokenizer.from_pretrained(root / "base")
  chat = {"add_generation_prompt": True, "tokenize": False}
  rendered = tokenizer.apply_chat_template(LINES[1]["messages"], **chat)
  prompts = [
    tokenizer(LINES[0]["prompt"])["input_ids"],
    tokenizer(rendered, add_special_tokens=False)["input_ids"],
    LINES[2]["input_ids"],
  ]
  found = _ours(root, LINES, Decoding(max_new_tokens=NEW, **fields), batch_size=2)
  for prompt, line in zip(prompts, found, strict=True):
    with torch.no_grad():
      ids = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=int),
        do_sample=False,
        max_new_tokens=NEW,
        num_beams=fields.get("beams", 1),
        no_repeat_ngram_size=fields.get("no_repeat_ngram"),
      )[0].tolist()
    ids = ids[1 if model.config.is_encoder_decoder else len(prompt) :]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert line == {"text": text, "output_ids": ids}


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ({"prompt": 3}, "line 2: prompt is a string, not 3"),
    ({"promt": "a"}, "line 2: has an unknown name 'promt'; did you mean 'prompt'"),
    ({"prompt": "a", "input_ids": [3]}, "line 2: has input_ids, prompt: one of"),
    ({"input_ids": [99]}, "line 2: has the id 99: ids go from 0 to 23"),
    ({"input_ids": []}, "line 2: input_ids is missing or empty"),
    ({"prompt": "a", "tools": []}, "line 2: has 'tools', which is of chats alone"),
    ({"messages": []}, "line 2: "),
    ({"input_ids": [3] * 23}, "line 2 has 23 tokens"),
  ],
)
def test_an_error_names_the_line_and_writes_nothing(folders, tmp_path, line, message):
  root, _ = folders
  source, out = _write(tmp_path / "in.jsonl", [LINES[0], line]), tmp_path / "out.jsonl"
  with pytest.raises(LoraxError, match=message):
    generate(str(root / "base"), None, source, str(out), Decoding(max_new_tokens=2))
  assert not out.exists()


def test_the_command_reads_its_flags_and_says_what_is_wrong_with_them(folders):
  root, _ = folders
  source, out = _write(root / "two.jsonl", LINES[:1]), root / "two-out.jsonl"
  files = (f"--base={root / 'base'}", f"--input={source}", f"--out={out}")
  done = commands.run(
    "experiments.generate",
    *files,
    "--max_new_tokens=3",
    "--stop=zz",
    "--temperature=0.5",
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == f"Texts: {out} (1 lines)\n"
  assert len(json.loads(out.read_text())["output_ids"]) <= 3
  wrong = commands.run("experiments.generate", *files, "--beams=2", "--temperature=1")
  assert wrong.returncode == 1
  assert wrong.stderr.startswith("error: beams=2 and temperature=1: either search")

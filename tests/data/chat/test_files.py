"""A template is found wherever a model keeps it, as transformers finds it."""

import json
import types
from pathlib import Path

import pytest
import transformers

from lorax_flax.data import chat as chats
from lorax_flax.errors import LoraxError
from lorax_flax.hub.files import gguf_tokenizer
from tests.data.chat.conftest import ONE, TEMPLATES, TOKENS, TURNS, byte_level

EOS = "{{ messages[0].content + eos_token }}"
EOS_FIELDS = {"content": "</s>", "lstrip": False, "__type": "AddedToken"}


def write(folder, **files):
  for name, content in files.items():
    path = folder / name.replace("__", "/").replace("_DOT_", ".")
    path.parent.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
  return folder


def peer(folder):
  byte_level(False).save(str(folder / "tokenizer.json"))
  return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


CONFIG, JINJA = "tokenizer_config_DOT_json", "chat_template_DOT_jinja"
TOOL_USE = "additional_chat_templates__tool_use_DOT_jinja"
FOLDERS = {
  "config": {CONFIG: {"chat_template": EOS, "eos_token": "</s>"}},
  "token with fields": {CONFIG: {"chat_template": EOS, "eos_token": EOS_FIELDS}},
  "named": {
    CONFIG: {
      "chat_template": [
        {"name": "default", "template": EOS},
        {"name": "tool_use", "template": "tools" + EOS},
      ],
      "eos_token": "</s>",
    }
  },
  "file beside": {CONFIG: {"chat_template": "old", "eos_token": "</s>"}, JINJA: EOS},
  "more files": {CONFIG: {"eos_token": "</s>"}, JINJA: EOS, TOOL_USE: "tools" + EOS},
  "older map": {
    CONFIG: {"chat_template": EOS, "eos_token": "<eos>"},
    "special_tokens_map_DOT_json": {"eos_token": "</s>"},
  },
  "another token": {
    CONFIG: {
      "chat_template": "{{ image_token + eos_token }}",
      "eos_token": "</s>",
      "extra_special_tokens": {"image_token": "<image>"},
    }
  },
}
TOOL = {"type": "function", "function": {"name": "f", "description": "d"}}


@pytest.mark.parametrize("case", FOLDERS)
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["", "tools"])
def test_folder_is_read_as_by_transformers(case, tools, tmp_path):
  folder = write(tmp_path, **FOLDERS[case])
  chat = chats.check({"messages": ONE, "tools": tools})
  found = chats.render(chats.template(folder), chat)
  expected = peer(folder).apply_chat_template(ONE, tools=tools, tokenize=False)
  assert found == expected
  assert found.endswith("</s>")


def test_processor_has_a_file_of_its_own(tmp_path):
  folder = write(
    tmp_path,
    chat_template_DOT_json={"chat_template": EOS},
    tokenizer_config_DOT_json={"eos_token": "</s>"},
  )
  template = chats.template(folder)
  assert chats.render(template, chats.check(ONE)) == "Hello</s>"
  assert chats.render(
    chats.template(folder / "chat_template.json"), chats.check(ONE)
  ) == ("Hello</s>")


def test_fields_of_a_config_will_do():
  template = chats.template({"chat_template": EOS, "eos_token": "</s>"})
  assert chats.render(template, chats.check(ONE)) == "Hello</s>"


def test_template_of_a_gguf_file_is_that_of_its_tokenizer(smollm2, tmp_path):
  folder, tokenizer, template = smollm2
  gguf = next(folder.glob("*.gguf"))
  for source in (folder, gguf):
    assert chats.template(source).texts == template.texts
  assert chats.special_tokens(gguf) == template.special_tokens
  assert template.special_tokens["eos_token"] == "<|im_end|>"
  peer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    chat_template=template.texts["default"],
    **template.special_tokens,
  )
  expected = peer.apply_chat_template(TURNS)["input_ids"]
  assert chats.encode(TURNS, tokenizer, template)[0].tolist() == expected


def test_gguf_file_may_have_several_templates(monkeypatch):
  metadata = {
    "tokenizer.ggml.tokens": ["a", "</s>"],
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.chat_template": EOS,
    "tokenizer.chat_template.tool_use": "tools" + EOS,
  }
  header = types.SimpleNamespace(metadata=metadata)
  monkeypatch.setattr(gguf_tokenizer.gguf_header, "read", lambda path: header)
  template = chats.template(gguf_tokenizer.settings(Path("a.gguf")))
  assert template.texts == {"default": EOS, "tool_use": "tools" + EOS}
  assert chats.render(template, chats.check(ONE)) == "Hello</s>"


def test_name_chooses_a_template(tmp_path):
  folder = write(tmp_path, **FOLDERS["more files"])
  template = chats.template(folder, name="tool_use")
  assert chats.render(template, chats.check(ONE)) == "toolsHello</s>"
  with pytest.raises(
    LoraxError, match=r"unknown chat template 'rag'.*default, tool_use"
  ):
    chats.render(chats.template(folder, name="rag"), chats.check(ONE))


def test_own_file_needs_the_special_tokens_that_it_names(tmp_path):
  file = write(tmp_path, own_DOT_jinja=EOS) / "own.jinja"
  with pytest.raises(LoraxError, match=r"own.jinja prints eos_token, and no tokenizer"):
    chats.template(file)
  template = chats.template(file, special_tokens={"eos_token": "<eos>"})
  assert chats.render(template, chats.check(ONE)) == "Hello<eos>"
  write(tmp_path, tokenizer_config_DOT_json={"eos_token": "</s>"})
  assert chats.render(chats.template(file), chats.check(ONE)) == "Hello</s>"


def test_folder_without_a_template_is_an_error(tmp_path):
  folder = write(tmp_path, tokenizer_config_DOT_json={"eos_token": "</s>"})
  with pytest.raises(
    LoraxError, match=r"no chat template in .*There are: tokenizer_config.json"
  ):
    chats.template(folder)
  with pytest.raises(LoraxError, match="has no chat_template"):
    chats.template(folder / "tokenizer_config.json")
  with pytest.raises(LoraxError, match=r"no chat template in .*absent"):
    chats.template(tmp_path / "absent")


@pytest.mark.parametrize(
  ("field", "message"),
  [
    ("{% for m in messages %}", "the chat template 'default': line 1: "),
    ("a\n{{ b }", "the chat template 'default': line 2: "),
    (3, "chat_template is no text, but 3"),
    ([{"name": "a"}], "has name and template in each entry"),
    ([{"name": "a", "template": 3}], "chat_template is no text"),
  ],
)
def test_template_that_is_none_is_an_error(field, message, tmp_path):
  write(tmp_path, tokenizer_config_DOT_json={"chat_template": field})
  with pytest.raises(LoraxError, match=message) as caught:
    chats.template(tmp_path)
  assert "tokenizer_config.json" in str(caught.value)


def test_file_that_is_no_text_is_an_error(tmp_path):
  (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
  with pytest.raises(LoraxError, match=r"cannot read .*chat_template.jinja"):
    chats.template(tmp_path)


def test_templates_of_the_table_load():
  assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(TOKENS)

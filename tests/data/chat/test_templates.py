"""Rendered chats are transformers' own, and errors name the message."""

import time

import pytest
import transformers

from lorax_flax.data import chat as chats
from lorax_flax.errors import LoraxError
from tests.data.chat.conftest import (
  ONE,
  TEMPLATES,
  TOKENS,
  TOOLS,
  TURNS,
  WEATHER,
  assistant,
  call,
  named,
  system,
  user,
)

EMPTY = [system(""), *TURNS]
PARTS = [
  user([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]),
  assistant("Hi"),
]
# Template, messages, and further arguments.
TABLE = {
  "chatml": ("chatml", TURNS, {}),
  "chatml, empty system": ("chatml", EMPTY, {}),
  "smollm2": ("smollm2", TURNS, {}),
  "smollm2, empty system": ("smollm2", EMPTY, {}),
  "llama2": ("llama2", [system("Be kind."), *TURNS], {}),
  "llama3": ("llama3", TURNS, {}),
  "llama3, tools": ("llama3", TOOLS, {"tools": [WEATHER]}),
  "llama3, date": ("llama3", EMPTY, {"date_string": "1 Jan 2030"}),
  "mistral": ("mistral", [system("Be kind."), *TURNS], {}),
  "mistral, tools": ("mistral", TOOLS, {"tools": [WEATHER]}),
  "gemma2": ("gemma2", TURNS, {}),
  "gemma3": ("gemma3", EMPTY, {}),
  "gemma3, parts": ("gemma3", PARTS, {}),
  "phi3": ("phi3", EMPTY, {}),
  "zephyr": ("zephyr", EMPTY, {}),
  "command_r": (
    "command_r",
    [system("Be kind."), *TURNS],
    {"documents": [{"title": "A", "text": "b & c"}]},
  ),
  "qwen2": ("qwen2", EMPTY, {}),
  "qwen2, tools": ("qwen2", TOOLS, {"tools": [WEATHER]}),
  "qwen3": ("qwen3", TURNS, {}),
  "qwen3, thoughts": (
    "qwen3",
    [*ONE, user("Why?"), assistant("So.", reasoning="Let me see.")],
    {"enable_thinking": False},
  ),
  "qwen3, thoughts in text": (
    "qwen3",
    [user("Why?"), assistant("<think>\nHm\n</think>\n\nSo.")],
    {},
  ),
  "qwen3, tools": ("qwen3", TOOLS, {}),
  "r1": ("r1", [user("Why?"), assistant("<think>\nHm\n</think>So.")], {}),
  "generation": ("generation", TURNS, {}),
  "plain": ("plain", EMPTY, {}),
}


def peer(name, tokenizer):
  """transformers' tokenizer, with the same template."""
  text = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, chat_template=text, **TOKENS[name]
  )


def row(messages, options):
  own = ("tools", "documents")
  return {
    "messages": messages,
    **{key: value for key, value in options.items() if key in own},
    "chat_template_kwargs": {k: v for k, v in options.items() if k not in own},
  }


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("prompt", [False, True])
def test_text_is_that_of_transformers(case, prompt, some_tokenizer):
  name, messages, options = TABLE[case]
  expected = peer(name, some_tokenizer).apply_chat_template(
    messages, tokenize=False, add_generation_prompt=prompt, **options
  )
  chat = chats.check(row(messages, options))
  assert chats.render(named(name), chat, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("case", TABLE)
def test_ids_are_those_of_transformers(case, tokenizer):
  name, messages, options = TABLE[case]
  text = chats.render(named(name), chats.check(row(messages, options)))
  expected = peer(name, tokenizer).apply_chat_template(messages, **options)["input_ids"]
  [(ids, _)] = chats.tokenize([chats.Marked(text, [(0, 1)])], tokenizer)
  assert ids.tolist() == expected


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma3", "phi3", "mistral"])
@pytest.mark.parametrize("content", ["I think", "I think ", [{"type": "text"}]])
def test_final_message_is_continued_as_by_transformers(name, content, some_tokenizer):
  if isinstance(content, list):
    if name != "gemma3":
      pytest.skip("it takes strings")
    content = [{"type": "text", "text": "I think"}]
  messages = [*ONE, user("Why?"), assistant(content)]
  expected = peer(name, some_tokenizer).apply_chat_template(
    messages, tokenize=False, continue_final_message=True
  )
  found = chats.render(named(name), chats.check(messages), continue_final_message=True)
  assert found == expected


def test_parts_are_joined_for_a_template_of_strings():
  text = chats.render(named("chatml"), chats.check(PARTS))
  assert text.startswith("<|im_start|>user\nHello<|im_end|>")


def test_strings_become_parts_for_a_template_of_parts(tmp_path):
  file = tmp_path / "parts.jinja"
  file.write_text(
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %};{% endfor %}"
  )
  assert chats.render(chats.template(file), chats.check(ONE)) == (
    "user: Hello;assistant: Hi, how are you?;"
  )


def error(template, messages, options=None):
  with pytest.raises(LoraxError) as caught:
    chats.render(template, chats.check(row(messages, options or {})))
  return str(caught.value)


def test_error_names_the_message():
  twice = [*ONE, user("a"), user("b"), assistant("c")]
  assert error(named("gemma2"), twice) == (
    "message 4 (user): the chat template refuses it: Roles must alternate"
  )
  assert error(named("gemma2"), [system("x"), *ONE]).startswith("message 1 (system): ")
  calls = [call("weather", {}), call("weather", {})]
  many = [*ONE, user("?"), assistant("", tool_calls=calls)]
  assert "message 4 (assistant): the chat template refuses it: One call" in error(
    named("llama3"), many
  )


def test_value_that_is_not_there_is_an_error_of_its_message(tmp_path):
  file = tmp_path / "own.jinja"
  file.write_text("{% for m in messages %}{{ m.extra.name }}{% endfor %}")
  message = error(
    chats.template(file), [user("a", extra={"name": "b"}), assistant("c")]
  )
  assert message.startswith("message 2 (assistant): the chat template fails: ")
  assert "has no attribute 'extra'" in message
  # Not of jinja's own, but of a Python operation.
  file.write_text("{% for m in messages %}{{ 'x' + m.extra }}{% endfor %}")
  message = error(chats.template(file), [user("a", extra="b"), assistant("c", extra=1)])
  assert message.startswith("message 2 (assistant): the chat template fails: TypeError")


@pytest.mark.parametrize(
  "attack",
  [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ dict.__class__.__mro__ }}",
    "{{ dict.update(messages[0], {'content': 'x'}) }}",
    "{% set ns = namespace(_x=1) %}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ range(10**9) | list }}",
  ],
)
def test_template_can_not_reach_python(tmp_path, attack):
  file = tmp_path / "own.jinja"
  file.write_text(attack)
  assert "the chat template fails" in error(chats.template(file), ONE)


def test_template_has_the_functions_of_transformers(tmp_path):
  file = tmp_path / "own.jinja"
  file.write_text(
    "{{ strftime_now('%Y') }} {{ dict(a='<ü>') | tojson }} {{ [1, 2] | tojson(indent=2)"
    " }} {% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}"
    "{% endfor %}"
  )
  text = chats.render(chats.template(file), chats.check(ONE))
  assert text == f'{time.strftime("%Y")} {{"a": "<ü>"}} [\n  1,\n  2\n] 01'


def test_unknown_name_lists_the_templates():
  texts = {"default": "d", "tool_use": "t", "rag": "r"}
  template = chats.ChatTemplate(texts, {}, "FOLDER", "tool_us")
  assert "did you mean 'tool_use'" in error(template, ONE)
  template = chats.ChatTemplate({"rag": "r", "other": "o"}, {}, "FOLDER")
  assert "no default: name one of other, rag" in error(template, ONE)


def test_chat_with_tools_takes_the_template_of_tools():
  template = chats.ChatTemplate({"default": "d", "tool_use": "t"}, {}, "FOLDER")
  assert chats.render(template, chats.check(ONE)) == "d"
  assert chats.render(template, chats.check(row(ONE, {"tools": [WEATHER]}))) == "t"


def test_special_token_of_the_row_goes_before_that_of_the_model(some_tokenizer):
  options = {"eos_token": "<END>"}
  expected = peer("zephyr", some_tokenizer).apply_chat_template(
    ONE, tokenize=False, **options
  )
  found = chats.render(named("zephyr"), chats.check(row(ONE, options)))
  assert found == expected
  assert "<END>" in found


def test_variables_can_not_replace_the_chat():
  assert "messages can't be given" in error(named("chatml"), ONE, {"messages": []})

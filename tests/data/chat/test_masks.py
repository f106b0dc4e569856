"""What is learnt of a chat: assistant turns, each with its end, and nothing else."""

import pytest

from lorax_flax.data import chat as chats
from lorax_flax.errors import LoraxError
from tests.data.chat.conftest import (
  ONE,
  TOOLS,
  TURNS,
  WEATHER,
  assistant,
  named,
  system,
  user,
)

# Templates that show the model each turn as it will be given it.
LEARNT = {
  "chatml": [f"{x}<|im_end|>" for x in ("Hi, how are you?", "  Grüße, 你好 🙂! \n")],
  "smollm2": [f"{x}<|im_end|>" for x in ("Hi, how are you?", "  Grüße, 你好 🙂! \n")],
  "llama2": [" Hi, how are you? </s>", " Grüße, 你好 🙂! </s>"],
  "llama3": ["Hi, how are you?<|eot_id|>", "Grüße, 你好 🙂!<|eot_id|>"],
  "mistral": [" Hi, how are you?</s>", " Grüße, 你好 🙂!</s>"],
  "gemma2": ["Hi, how are you?<end_of_turn>", "Grüße, 你好 🙂!<end_of_turn>"],
  "gemma3": ["Hi, how are you?<end_of_turn>", "Grüße, 你好 🙂!<end_of_turn>"],
  # The spaces are within the header's token, <|assistant|>.
  "phi3": ["Hi, how are you?<|end|>", "Grüße, 你好 🙂! \n<|end|>"],
  "command_r": [
    "Hi, how are you?<|END_OF_TURN_TOKEN|>",
    "Grüße, 你好 🙂!<|END_OF_TURN_TOKEN|>",
  ],
  "qwen2": [f"{x}<|im_end|>" for x in ("Hi, how are you?", "  Grüße, 你好 🙂! \n")],
  "generation": [
    f"{x}<|im_end|>" for x in ("Hi, how are you?", "  Grüße, 你好 🙂! \n")
  ],
  "plain": [" Hi, how are you?\n\n", "   Grüße, 你好 🙂! \n\n\n"],
}


def marked(template, row, tokenizer, **options):
  """The parts of the text that are learnt, and the text with these in brackets."""
  found = chats.mark(
    template, chats.check(row), chats.markers(tokenizer, template), **options
  )
  parts = [found.text[start:end] for start, end in found.spans]
  text = found.text
  for start, end in reversed(found.spans):
    text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
  return parts, text


def refused(template, row, tokenizer, **options):
  with pytest.raises(LoraxError) as caught:
    marked(template, row, tokenizer, **options)
  return str(caught.value)


@pytest.mark.parametrize("name", LEARNT)
def test_each_turn_is_learnt_with_its_end(name, some_tokenizer):
  parts, _ = marked(named(name), TURNS[:4], some_tokenizer)
  # Phi-3's chat has an end of its own, behind that of its last turn.
  last = "\n<|endoftext|>" if name == "phi3" else ""
  first, second = LEARNT[name]
  assert parts == [first, second + last]


@pytest.mark.parametrize("name", LEARNT)
def test_turn_is_learnt_alike_where_others_follow(name, some_tokenizer):
  parts, _ = marked(named(name), TURNS, some_tokenizer)
  assert parts[:2] == LEARNT[name]


def test_text_between_turns_is_not_learnt(some_tokenizer):
  _, text = marked(named("chatml"), [system(""), *ONE, user("Bye")], some_tokenizer)
  assert text == (
    "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\n⟦Hi, how are you?<|im_end|>⟧\n"
    "<|im_start|>user\nBye<|im_end|>\n"
  )


def test_header_is_learnt_where_the_prompt_has_none(some_tokenizer):
  _, text = marked(named("zephyr"), [*ONE, user("Bye")], some_tokenizer)
  # Zephyr's prompt ends before the new line, which the model writes.
  assert "<|assistant|>\n⟦Hi, how are you?</s>⟧\n<|user|>" in text


@pytest.mark.parametrize("name", ["qwen2", "llama3", "mistral"])
def test_calls_of_tools_are_learnt_and_their_results_are_not(name, some_tokenizer):
  row = {"messages": TOOLS, "tools": [WEATHER]}
  parts, _ = marked(named(name), row, some_tokenizer)
  call = {
    "qwen2": '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n'
    "</tool_call><|im_end|>",
    "llama3": '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"},'
    ' "id": "call00001"}]</s>',
  }[name]
  assert parts[0] == call
  assert len(parts) == 2
  assert parts[1].strip().startswith("It is 21 degrees.")


def test_system_message_in_the_first_turn_is_not_learnt(some_tokenizer):
  messages = [system("Be kind."), *TURNS]
  _, text = marked(named("gemma3"), messages, some_tokenizer)
  assert "user\nBe kind.\n\nHello<end_of_turn>" in text
  assert text.count("⟦") == 3


# Qwen3 shows thoughts in the last turn alone.
THOUGHTS = [
  user("Why?"),
  assistant("So.", reasoning_content="Hm."),
  user("And?"),
  assistant("Thus.", reasoning_content="Well."),
]


def test_turn_that_later_messages_change_is_refused(some_tokenizer):
  message = refused(named("qwen3"), THOUGHTS, some_tokenizer)
  assert message.startswith(
    "message 2 (assistant): the chat template renders it with '<think>\\nHm.\\n</think>"
  )
  assert "with 'So.<|im_end|>" in message
  assert 'learn="last"' in message
  assert "{% generation %}" in message


def test_last_turn_is_learnt_where_others_can_not_be(some_tokenizer):
  parts, _ = marked(named("qwen3"), THOUGHTS, some_tokenizer, learn="last")
  assert parts == ["<think>\nWell.\n</think>\n\nThus.<|im_end|>"]


def test_split_chat_has_each_turn_as_its_last(some_tokenizer):
  parts = []
  for chat in chats.split(chats.check(THOUGHTS)):
    template = named("qwen3")
    found = chats.markers(some_tokenizer, template)
    marked = chats.mark(template, chat, found, learn="last")
    parts += [marked.text[start:end] for start, end in marked.spans]
  assert parts == [
    "<think>\nHm.\n</think>\n\nSo.<|im_end|>",
    "<think>\nWell.\n</think>\n\nThus.<|im_end|>",
  ]


def test_empty_thoughts_of_the_prompt_are_not_learnt(some_tokenizer):
  row = {"messages": ONE, "chat_template_kwargs": {"enable_thinking": False}}
  parts, _ = marked(named("qwen3"), row, some_tokenizer)
  assert parts == ["Hi, how are you?<|im_end|>"]


def test_prompt_that_the_chat_does_not_have_is_refused(some_tokenizer):
  message = refused(named("r1"), ONE, some_tokenizer)
  assert "message 2 (assistant): its prompt by the chat template has '<think>" in (
    message
  )
  assert "learn=" not in message  # The last turn alone would not do either.
  assert "{% generation %}" in message


def test_tools_that_move_with_the_last_question_are_refused(some_tokenizer):
  row = {
    "messages": [*TOOLS, user("And in Rome?"), assistant("22.")],
    "tools": [WEATHER],
  }
  message = refused(named("mistral"), row, some_tokenizer)
  assert message.startswith("message 2 (assistant): its prompt by the chat template")
  assert "'AVAILABLE_TOOLS]" in message
  parts, _ = marked(named("mistral"), row, some_tokenizer, learn="last")
  assert parts == [" 22.</s>"]


def test_turn_that_is_cut_where_others_follow_is_refused(some_tokenizer, tmp_path):
  file = tmp_path / "own.jinja"
  file.write_text(
    "{% for m in messages %}{{ '[INST]' + m.role + ':' }}"
    "{{ m.content if loop.last else m.content[:8] }}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[INST]assistant:' }}{% endif %}"
  )
  message = refused(chats.template(file), [*ONE, user("Bye")], some_tokenizer)
  assert "with 'are you?</s>' where it is the last message, and with '</s>" in message


def test_turn_that_ends_otherwise_where_others_follow_is_refused(
  some_tokenizer, tmp_path
):
  # As gpt-oss's, whose last turn alone ends with a token that stops it.
  file = tmp_path / "own.jinja"
  file.write_text(
    "{% for m in messages %}{{ '[INST]' + m.role + '<think>' + m.content }}"
    "{{ '</s>' if loop.last and m.role == 'assistant' else '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[INST]assistant' }}{% endif %}"
  )
  message = refused(chats.template(file), [*ONE, user("Bye")], some_tokenizer)
  assert "renders it with '/s>' where it is the last message, and with 'eos>" in message


def test_chat_that_an_assistant_begins_is_refused_where_its_prompt_fails(
  some_tokenizer,
):
  begins = [assistant("Welcome!"), *ONE]
  message = refused(named("smollm2"), begins, some_tokenizer)
  assert message.startswith("message 1 (assistant): its prompt") or (
    "message 1 (assistant): what is before it can't be rendered alone" in message
  )
  parts, _ = marked(named("chatml"), begins, some_tokenizer)
  assert parts == ["Welcome!<|im_end|>", "Hi, how are you?<|im_end|>"]


def test_turn_that_the_template_leaves_out_is_refused(some_tokenizer, tmp_path):
  file = tmp_path / "own.jinja"
  file.write_text(
    "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
  )
  message = refused(chats.template(file), ONE, some_tokenizer)
  assert message == "message 2 (assistant): the chat template prints nothing for it"


def test_chat_without_an_assistant_is_refused(some_tokenizer):
  message = refused(named("chatml"), [system("a"), user("b")], some_tokenizer)
  assert message == (
    "no message has the role assistant, so that nothing is learnt. Roles: system, user"
  )


def test_generation_in_a_macro_is_refused(some_tokenizer, tmp_path):
  file = tmp_path / "own.jinja"
  file.write_text(
    "{% macro turn(m) %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
  )
  message = refused(chats.template(file), ONE, some_tokenizer)
  assert "{% generation %} inside a macro" in message


def test_generation_that_marks_nothing_is_refused(some_tokenizer, tmp_path):
  file = tmp_path / "own.jinja"
  file.write_text(
    "{% for m in messages %}{% if m.role == 'model' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
  )
  assert "marks nothing in this chat" in refused(
    chats.template(file), ONE, some_tokenizer
  )


def test_last_of_the_marked_turns_is_learnt_alone(some_tokenizer):
  parts, _ = marked(named("generation"), TURNS, some_tokenizer, learn="last")
  assert parts == ["See\n\nyou<|im_end|>"]

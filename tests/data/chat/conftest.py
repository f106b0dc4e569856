"""Tokenizers, and templates that are written as those of public models."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import (
  AddedToken,
  decoders,
  models,
  pre_tokenizers,
  processors,
  trainers,
)

from lorax_flax.data import chat as chats
from lorax_flax.data import tokenize as loading
from lorax_flax.errors import LoraxError
from lorax_flax.hub import assets

TEMPLATES = Path(__file__).parent / "templates"
# Special tokens of each template.
TOKENS = {
  "chatml": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
  "smollm2": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
  "llama2": {"bos_token": "<s>", "eos_token": "</s>"},
  "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
  "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
  "gemma2": {"bos_token": "<bos>", "eos_token": "<eos>"},
  "gemma3": {"bos_token": "<bos>", "eos_token": "<eos>"},
  "phi3": {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
  "zephyr": {"bos_token": "<s>", "eos_token": "</s>"},
  "command_r": {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"},
  "qwen2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
  "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
  "r1": {"bos_token": "<s>", "eos_token": "</s>"},
  "generation": {"eos_token": "<|im_end|>"},
  "plain": {"eos_token": "<|endoftext|>"},
}
_SPECIAL = sorted(
  {token for tokens in TOKENS.values() for token in tokens.values()}
  | {"<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]", "[TOOL_CALLS]"}
  | {"[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "<start_of_turn>", "<end_of_turn>"}
  | {"<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"}
)
# Phi-3's, which take the white space behind them.
_GREEDY = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
TEXT = (
  "Hello! How are you today? The weather in Paris is sunny, 21 degrees.\n"
  "assistant user system name arguments <think> </think> Grüße, 你好, 🙂 "
)


def _add(tokenizer):
  tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in _SPECIAL])
  tokenizer.add_special_tokens(
    [AddedToken(t, rstrip=True, normalized=False) for t in _GREEDY]
  )
  tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>", "\n\n"])
  return tokenizer


def byte_level(trim_offsets):
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=400, initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator([TEXT] * 3, trainer)
  return _add(tokenizer)


def sentence_piece():
  """A tokenizer as those of Llama 2 and Gemma, which starts each text with a BOS."""
  tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
  tokenizer.decoder = decoders.Metaspace()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<unk>", *(f"<0x{i:02X}>" for i in range(256))],
    show_progress=False,
  )
  tokenizer.train_from_iterator([TEXT * 3] * 3, trainer)
  tokenizer = _add(tokenizer)
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
  )
  return tokenizer


TOKENIZERS = {
  "bytes": lambda: byte_level(False),
  "trimmed": lambda: byte_level(True),
  "pieces": sentence_piece,
}


@pytest.fixture(scope="session", params=TOKENIZERS)
def tokenizer(request):
  return TOKENIZERS[request.param]()


@pytest.fixture(scope="session")
def some_tokenizer():
  return byte_level(False)


@pytest.fixture(scope="session")
def smollm2():
  """The folder of a model, its tokenizer and its chat template."""
  try:
    folder = assets.path("smollm2")
  except LoraxError as error:
    pytest.skip(f"no package registry: {error}")
  return folder, loading.load_tokenizer(folder).backend, chats.template(folder)


def named(name, **changes):
  """A template of the table."""
  return chats.template(
    TEMPLATES / f"{name}.jinja", special_tokens=TOKENS[name] | changes
  )


def user(content, **more):
  return {"role": "user", "content": content, **more}


def assistant(content, **more):
  return {"role": "assistant", "content": content, **more}


def system(content):
  return {"role": "system", "content": content}


def call(name, arguments, **more):
  function = {"name": name, "arguments": arguments}
  return {"type": "function", "function": function, **more}


WEATHER = {
  "type": "function",
  "function": {
    "name": "weather",
    "description": "The weather <today> & tomorrow, in °C",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
  },
}
ONE = [user("Hello"), assistant("Hi, how are you?")]
TURNS = [
  *ONE,
  user("Well. And you?"),
  assistant("  Grüße, 你好 🙂! \n"),
  user("Bye"),
  assistant("See\n\nyou"),
]
TOOLS = [
  user("Weather in Paris?"),
  assistant(None, tool_calls=[call("weather", {"city": "Paris"}, id="call00001")]),
  {"role": "tool", "content": "21", "name": "weather", "tool_call_id": "call00001"},
  assistant("It is 21 degrees."),
]

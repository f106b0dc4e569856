"""The tokenizer in a GGUF file, as one of the tokenizers library."""

import dataclasses
import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lorax_flax.errors import LoraxError, check_known, listing, prefixed
from lorax_flax.hub.files import gguf_header

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"


class TokenKind(enum.IntEnum):
  """llama.cpp's kinds of tokens; control and user-defined ones are never split."""

  NORMAL = 1
  UNKNOWN = 2
  CONTROL = 3
  USER_DEFINED = 4
  UNUSED = 5
  BYTE = 6


# Special tokens by transformers' names, and llama.cpp's names of their ids.
SPECIAL = {
  "bos_token": "bos_token_id",
  "eos_token": "eos_token_id",
  "unk_token": "unknown_token_id",
  "pad_token": "padding_token_id",
}


@dataclasses.dataclass(frozen=True)
class Splitting:
  """The pre-tokenisation of a text, before pairs of bytes are merged.

  Attributes:
    regex: of a piece; None: GPT-2's.
    digits: split off each digit first.
    ignore_merges: a piece that is a token is kept, whatever the merges are.
    bos: a text starts with the first special token, unless the file has a flag.
  """

  regex: str | None = None
  digits: bool = False
  ignore_merges: bool = False
  bos: bool = False


def _words(numbers: str) -> str:
  """Llama 3's pieces: contractions, words, numbers, signs, spaces."""
  return (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    rf"|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  )


# By llama.cpp's names.
SPLITTINGS: Mapping[str, Splitting] = {
  "gpt-2": Splitting(),
  "smollm": Splitting(digits=True),
  "llama-bpe": Splitting(regex=_words(r"\p{N}{1,3}"), ignore_merges=True, bos=True),
  "qwen2": Splitting(regex=_words(r"\p{N}")),
}


def load(path: Path) -> tokenizers.Tokenizer:
  """Makes the tokenizer of a GGUF file: byte-level BPE, or SentencePiece's.

  Raises:
    LoraxError: a damaged file, or a tokenizer of another kind or pre-tokenisation.
  """
  metadata = gguf_header.read(path).metadata
  # The tokenizers library raises bare Exception for what it can't use.
  with prefixed(f"cannot make the tokenizer of {path}", Exception):
    return _make(metadata)


def write(path: Path, folder: Path) -> None:
  """Writes tokenizer.json and tokenizer_config.json of a GGUF file into a folder."""
  load(path).save(str(folder / "tokenizer.json"))
  fields = {"tokenizer_class": "PreTrainedTokenizerFast", **settings(path)}
  text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
  (folder / "tokenizer_config.json").write_text(f"{text}\n", encoding="utf-8")


def special(path: Path) -> dict[str, str]:
  """The special tokens of a GGUF file, by transformers' names."""
  metadata = gguf_header.read(path).metadata
  tokens = _strings(metadata, "tokens")
  return {
    name: _token(metadata, key, tokens)
    for name, key in SPECIAL.items()
    if PREFIX + key in metadata
  }


def settings(path: Path) -> dict[str, Any]:
  """Fields of transformers' tokenizer_config.json beside a tokenizer.json.

  Raises:
    LoraxError: a damaged file.
  """
  metadata = gguf_header.read(path).metadata
  fields: dict[str, Any] = {**special(path)}
  templates = {"default": metadata.get(TEMPLATE)} | {
    key.removeprefix(f"{TEMPLATE}."): value
    for key, value in metadata.items()
    if key.startswith(f"{TEMPLATE}.")
  }
  named = [
    {"name": name, "template": text}
    for name, text in templates.items()
    if isinstance(text, str)
  ]
  if len(named) > 1:
    fields["chat_template"] = named
  elif named:
    fields["chat_template"] = named[0]["template"]
  return {**fields, "clean_up_tokenization_spaces": False}


def _make(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
  kind = metadata.get(f"{PREFIX}model")
  if kind not in _KINDS:
    raise LoraxError(
      f"it is of kind {kind!r}, and only {listing(map(repr, _KINDS))}, byte-level BPE"
      " and SentencePiece's, are made here: put the model's tokenizer.json beside the"
      " file and name the folder"
    )
  tokens = _strings(metadata, "tokens")
  vocab = {token: i for i, token in enumerate(tokens)}
  if len(vocab) != len(tokens):
    raise LoraxError(f"{len(tokens) - len(vocab)} of its tokens are duplicates")
  tokenizer, bos = _KINDS[kind](metadata, vocab)
  _add_whole_tokens(tokenizer, tokens, metadata.get(f"{PREFIX}token_type"))
  tokenizer.post_processor = _ends(metadata, tokens, bos)
  return tokenizer


def _byte_level(
  metadata: Mapping[str, Any], vocab: Mapping[str, int]
) -> tuple[tokenizers.Tokenizer, bool]:
  """The tokenizer, and whether a text starts with bos unless the file has a flag."""
  name = str(metadata.get(f"{PREFIX}pre"))
  check_known("pre-tokenisation", name, SPLITTINGS)
  splitting = SPLITTINGS[name]
  model = models.BPE(
    dict(vocab), _pairs(metadata), ignore_merges=splitting.ignore_merges
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizer(splitting)
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer, splitting.bos


def _sentencepiece(
  metadata: Mapping[str, Any], vocab: Mapping[str, int]
) -> tuple[tokenizers.Tokenizer, bool]:
  """The tokenizer and its flag: pairs of higher scores are merged first."""
  scores = metadata.get(f"{PREFIX}scores")
  if not isinstance(scores, list) or len(scores) != len(vocab):
    raise LoraxError(f"{len(vocab)} tokens, and their scores are {scores!r:.80}")
  unknown_id = metadata.get(f"{PREFIX}unknown_token_id")
  unk = next((token for token, i in vocab.items() if i == unknown_id), None)
  kinds = metadata.get(f"{PREFIX}token_type") or [TokenKind.NORMAL] * len(vocab)
  normal = [token for token, i in vocab.items() if kinds[i] == TokenKind.NORMAL]
  ordered = sorted(normal, key=lambda token: -scores[vocab[token]])
  merges = [
    (token[:i], token[i:])
    for token in ordered
    for i in range(1, len(token))
    if token[:i] in vocab and token[i:] in vocab
  ]
  model = models.BPE(
    dict(vocab), merges, unk_token=unk, fuse_unk=True, byte_fallback=True
  )
  tokenizer = tokenizers.Tokenizer(model)
  spaced = metadata.get(f"{PREFIX}add_space_prefix", True)
  # llama.cpp puts a space before each text, and behind each special token.
  prepend = [normalizers.Prepend("▁")] if spaced else []
  tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
  steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  strip = [decoders.Strip(content=" ", left=1)] if spaced else []
  tokenizer.decoder = decoders.Sequence([*steps, *strip])
  return tokenizer, True


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}


def pre_tokenizer(splitting: Splitting) -> pre_tokenizers.PreTokenizer:
  """The steps that split a text into pieces."""
  by_regex = splitting.regex is None
  steps: list[Any] = [
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_regex)
  ]
  if splitting.regex is not None:
    regex = tokenizers.Regex(splitting.regex)
    steps.insert(0, pre_tokenizers.Split(regex, behavior="isolated"))
  if splitting.digits:
    steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
  return pre_tokenizers.Sequence(steps)


def _add_whole_tokens(
  tokenizer: tokenizers.Tokenizer, tokens: list[str], kinds: Any
) -> None:
  kinds = [1] * len(tokens) if kinds is None else kinds
  if not isinstance(kinds, list) or len(kinds) != len(tokens):
    raise LoraxError(f"{len(tokens)} tokens, and their kinds are {kinds!r:.80}")
  for chosen, special in ((TokenKind.CONTROL, True), (TokenKind.USER_DEFINED, False)):
    added = [
      tokenizers.AddedToken(token, normalized=False, special=special)
      for token, kind in zip(tokens, kinds, strict=True)
      if kind == chosen
    ]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)


def _ends(metadata: Mapping[str, Any], tokens: list[str], bos: bool) -> Any:
  """The special tokens before and after a text."""
  ends = {
    name: _token(metadata, f"{name}_token_id", tokens)
    for name, default in (("bos", bos), ("eos", False))
    if metadata.get(f"{PREFIX}add_{name}_token", default)
  }
  if not ends:
    return processors.ByteLevel(trim_offsets=False)

  # As lists, since a token may hold characters that have a meaning in a string.
  def around(text: str) -> list[str]:
    return [part for part in (ends.get("bos"), text, ends.get("eos")) if part]

  return processors.TemplateProcessing(
    single=around("$A"),
    pair=[*around("$A"), *around("$B")],
    special_tokens=[(token, tokens.index(token)) for token in set(ends.values())],
  )


def _pairs(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
  found = []
  for merge in _strings(metadata, "merges"):
    parts = merge.split(" ")
    if len(parts) != 2:
      raise LoraxError(f"its merge {merge!r} is no pair")
    found.append((parts[0], parts[1]))
  return found


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
  found = metadata.get(PREFIX + name)
  if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
    raise LoraxError(f"its {name} are {found!r:.80}, and not a list of strings")
  return found


def _token(metadata: Mapping[str, Any], name: str, tokens: list[str]) -> str:
  found = metadata.get(PREFIX + name)
  if type(found) is not int or not 0 <= found < len(tokens):
    raise LoraxError(f"its {name} is {found!r}, of {len(tokens)} tokens")
  return tokens[found]

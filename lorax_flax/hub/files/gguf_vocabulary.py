"""The metadata of a GGUF file that describes a tokenizer of the tokenizers library."""

import json
import re
from collections.abc import Mapping
from typing import Any

import tokenizers

from lorax_flax.errors import LoraxError, listing
from lorax_flax.hub.files import gguf_tokenizer
from lorax_flax.hub.files.gguf_tokenizer import PREFIX, SPECIAL, TEMPLATE, TokenKind

_UNMERGED = -1e6  # the score of what no merge makes
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNUSED = "[PAD{}]"


def metadata(
  tokenizer: tokenizers.Tokenizer,
  special: Mapping[str, str],
  templates: Mapping[str, str],
  vocab_size: int,
) -> dict[str, Any]:
  """The metadata of a tokenizer.

  Args:
    special: texts of special tokens by transformers' names.
    templates: chat templates by name; "default" is the usual one.
    vocab_size: number of the model's rows; rows without a token get an unused one.

  Raises:
    LoraxError: a tokenizer that llama.cpp has no equal of here.
  """
  described = json.loads(tokenizer.to_str())
  ids = tokenizer.get_vocab(with_added_tokens=True)
  if ids and max(ids.values()) >= vocab_size:
    raise LoraxError(
      f"GGUF: the tokenizer has ids up to {max(ids.values())}, and the model"
      f" {vocab_size} rows"
    )
  tokens = [_UNUSED.format(i) for i in range(vocab_size)]
  for token, i in ids.items():
    tokens[i] = token
  model = described["model"]
  if model["type"] != "BPE":
    raise LoraxError(
      f"GGUF: a tokenizer of kind {model['type']} is not written, only BPE is"
    )
  merges = [tuple(pair) for pair in model["merges"]]
  if model.get("byte_fallback"):
    found = _sentencepiece(tokenizer, tokens, merges)
  else:
    texts = [" ".join(pair) for pair in merges]
    found = {"model": "gpt2", "pre": _splitting(described), "merges": texts}
  kinds = _kinds(described, ids, vocab_size, special.get("unk_token"))
  found |= {"tokens": tokens, "token_type": kinds}
  for name, key in SPECIAL.items():
    if special.get(name) in ids:
      found[key] = ids[special[name]]
  found |= _ends(tokenizer, found)
  return {PREFIX + key: value for key, value in found.items()} | _templates(templates)


def _kinds(
  described: Mapping[str, Any],
  ids: Mapping[str, int],
  vocab_size: int,
  unk: str | None,
) -> list[int]:
  kinds = [TokenKind.UNUSED] * vocab_size
  is_byte = described["model"].get("byte_fallback")
  for token, i in ids.items():
    byte = is_byte and _BYTE.fullmatch(token)
    kinds[i] = TokenKind.BYTE if byte else TokenKind.NORMAL
  for added in described["added_tokens"]:
    control = TokenKind.CONTROL if added["special"] else TokenKind.USER_DEFINED
    kinds[added["id"]] = control
  if is_byte and unk is not None and unk in ids:
    kinds[ids[unk]] = TokenKind.UNKNOWN
  return [int(kind) for kind in kinds]


def _sentencepiece(
  tokenizer: tokenizers.Tokenizer, tokens: list[str], merges: list[tuple[str, str]]
) -> dict[str, Any]:
  """Scores in the order of the merges, as SentencePiece's BPE has them."""
  pieces = tokenizer.encode("a  b", add_special_tokens=False).tokens
  text = "".join(pieces)
  if text.removeprefix("▁") != "a▁▁b":
    raise LoraxError(
      f"GGUF: the tokenizer splits 'a  b' into {pieces}, which SentencePiece's would"
      " not: it is not written"
    )
  ranks: dict[str, int] = {}
  for rank, (left, right) in enumerate(merges):
    ranks.setdefault(left + right, rank)
  return {
    "model": "llama",
    "pre": "default",
    "scores": [float(-ranks[t]) if t in ranks else _UNMERGED for t in tokens],
    "add_space_prefix": text.startswith("▁"),
  }


def _splitting(described: Mapping[str, Any]) -> str:
  """llama.cpp's name of the pre-tokenisation."""
  found = _steps(described["pre_tokenizer"])
  ignores = bool(described["model"].get("ignore_merges"))
  normalizer = described["normalizer"]
  # llama.cpp normalises nothing; texts are composed as a rule.
  if normalizer is None or normalizer["type"] == "NFC":
    for name, splitting in gguf_tokenizer.SPLITTINGS.items():
      pre_tokenizer = gguf_tokenizer.pre_tokenizer(splitting)
      if ignores == splitting.ignore_merges and found == _steps(
        json.loads(pre_tokenizer.__getstate__())
      ):
        return name
  raise LoraxError(
    "GGUF: llama.cpp's name of this tokenizer's pre-tokenisation is not known here:"
    f" {json.dumps(described['pre_tokenizer'])}, normalizer {json.dumps(normalizer)}."
    f" There are: {listing(gguf_tokenizer.SPLITTINGS)}"
  )


def _steps(described: Mapping[str, Any] | None) -> list[dict[str, Any]]:
  """The steps of a pre-tokeniser, without what does not change ids."""
  if described is None:
    return []
  if described["type"] == "Sequence":
    return [step for each in described["pretokenizers"] for step in _steps(each)]
  return [{key: value for key, value in described.items() if key != "trim_offsets"}]


def _ends(tokenizer: tokenizers.Tokenizer, found: Mapping[str, Any]) -> dict[str, Any]:
  """Flags of the special tokens before and after a text."""
  around = tokenizer.encode("").ids
  bos, eos = found.get("bos_token_id"), found.get("eos_token_id")
  flags = {
    "add_bos_token": bool(around) and around[0] == bos,
    "add_eos_token": len(around) > (bos == eos) and around[-1] == eos,
  }
  if len(around) != sum(flags.values()):
    raise LoraxError(
      f"GGUF: the tokenizer puts the ids {around} around a text, and llama.cpp puts bos"
      f" ({bos}) before it and eos ({eos}) behind it"
    )
  return flags


def _templates(templates: Mapping[str, str]) -> dict[str, Any]:
  named = sorted(name for name in templates if name != "default")
  found: dict[str, Any] = {f"{TEMPLATE}.{name}": templates[name] for name in named}
  if named:
    found[f"{TEMPLATE}s"] = named
  if "default" in templates:
    found[TEMPLATE] = templates["default"]
  return found

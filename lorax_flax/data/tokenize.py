"""A checkpoint's own tokenizer, and splits tokenised with it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from rich.progress import track
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lorax_flax.data.examples import Example
from lorax_flax.data.tokens import Tokens, ragged
from lorax_flax.errors import LoraxError, listing
from lorax_flax.hub.files import gguf_header, gguf_tokenizer

# Texts that go to the tokenizer's threads at once.
_CHUNK = 2048
# Fewer examples than this take about a second, and need no progress bar.
_LONG = 20_000
_PAD_TOKENS = ("[PAD]", "<pad>")


def load_tokenizer(folder: str | Path) -> tokenizers.Tokenizer:
  """Loads the tokenizer of a checkpoint's folder.

  It is read from tokenizer.json; or built from vocab.txt (BERT's WordPiece) or from
  vocab.json and merges.txt (byte-level BPE: RoBERTa's where `<s>` and `</s>` are in the
  vocabulary, else GPT-2's) with the fields of tokenizer_config.json; or else taken from
  a GGUF file, which may also be given instead of the folder. Truncation and padding in
  a tokenizer.json are switched off: lengths are decided by our config.

  Raises:
    LoraxError: none of these files exists, or one can't be read.
  """
  folder = Path(folder)
  for files, build in _BUILDERS.items():
    if all((folder / file).is_file() for file in files):
      try:
        tokenizer = build(folder)
      except LoraxError:
        raise
      # The tokenizers library raises bare Exception for a file that it can't parse.
      except Exception as error:
        raise LoraxError(
          f"can't read the tokenizer in {folder / files[0]}: {error}"
        ) from error
      tokenizer.no_truncation()
      tokenizer.no_padding()
      return tokenizer
  if (file := gguf_header.find(folder)) is not None:
    return gguf_tokenizer.load(file)
  expected = "; or ".join(" and ".join(files) for files in _BUILDERS)
  there = listing(p.name for p in folder.iterdir()) if folder.is_dir() else ""
  raise LoraxError(
    f"no tokenizer in {folder}: it has neither {expected}.{_sentencepiece(folder)} "
    f"There are: {there or 'none'}"
  )


def _sentencepiece(folder: Path) -> str:
  """A sentence of advice where there is only SentencePiece's own file."""
  if not (found := sorted(path.name for path in folder.glob("*.model"))):
    return ""
  return (
    f" {found[0]} is SentencePiece's and is not read; transformers makes a "
    f"tokenizer.json of it: AutoTokenizer.from_pretrained({str(folder)!r})"
    f".save_pretrained({str(folder)!r})."
  )


def pad_id(tokenizer: tokenizers.Tokenizer) -> int:
  """The id of padding: of `[PAD]` or `<pad>`; 0 in a vocabulary without these.

  Padding is masked, so that the value matters only to models that derive positions from
  it (RoBERTa), and these have the token.
  """
  ids = (tokenizer.token_to_id(token) for token in _PAD_TOKENS)
  return next((i for i in ids if i is not None), 0)


def tokenize(
  examples: Sequence[Example],
  tokenizer: tokenizers.Tokenizer,
  *,
  max_length: int,
  token_types: bool,
  regression: bool = False,
  description: str = "Tokenising",
) -> Tokens:
  """Tokenises a split once.

  Args:
    examples: texts or pairs of texts; labels in all of them, or in none.
    tokenizer: of `load_tokenizer`.
    max_length: ids beyond this number, special tokens included, are cut off, from the
      longer text of a pair first.
    token_types: whether the model has more than one token type.
    regression: labels are float32 numbers, not int32 classes.
    description: of the progress bar, which only a long split has.

  Returns:
    Tokens, row i being example i.

  Raises:
    LoraxError: an example without text, some labels missing, or a max_length without
      room for text.
  """
  pair = any(example.get("text_pair") is not None for example in examples)
  special = tokenizer.num_special_tokens_to_add(pair)
  if max_length <= special:
    raise LoraxError(
      f"max_length {max_length} leaves no room for text beside {special} special tokens"
    )
  cutter = tokenizers.Tokenizer.from_str(tokenizer.to_str())
  cutter.enable_truncation(max_length, strategy="longest_first")
  texts = [_text(number, example) for number, example in enumerate(examples, 1)]
  starts: Any = range(0, len(texts), _CHUNK)
  if len(texts) > _LONG:
    starts = track(starts, description=f"{description} {len(texts):,}")
  ids, types = [], []
  for start in starts:
    for encoding in _encoded(cutter, texts[start : start + _CHUNK]):
      ids.append(np.asarray(encoding.ids, np.int32))
      if token_types:
        types.append(np.asarray(encoding.type_ids, np.int32))
  ids_S, offsets = ragged(ids)
  return Tokens(
    input_ids_S=ids_S,
    offsets=offsets,
    pad_id=pad_id(tokenizer),
    token_type_ids_S=ragged(types)[0] if token_types else None,
    labels_N=_labels(examples, np.float32 if regression else np.int32),
  )


def _encoded(tokenizer: tokenizers.Tokenizer, texts: Sequence[Any]) -> Sequence[Any]:
  try:
    return tokenizer.encode_batch_fast(texts)
  # The tokenizers library raises bare Exception where its file is incomplete.
  except Exception as error:
    raise LoraxError(f"this tokenizer can't encode the texts: {error}") from error


def _text(number: int, example: Example) -> str | tuple[str, str]:
  text, pair = example.get("text"), example.get("text_pair")
  if not isinstance(text, str) or not isinstance(pair, str | None):
    raise LoraxError(
      f"example {number}: text is a string, and text_pair a string or nothing; "
      f"found {dict(example)!r:.200}"
    )
  return text if pair is None else (text, pair)


def _labels(examples: Sequence[Example], dtype: type) -> np.ndarray | None:
  missing = [n for n, e in enumerate(examples, 1) if e.get("label") is None]
  if len(missing) == len(examples):
    return None
  if missing:
    raise LoraxError(
      f"{len(missing)} examples have no label, the first is {missing[0]}"
    )
  return np.asarray([example["label"] for example in examples], dtype)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
  file = folder / "tokenizer_config.json"
  return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def _special(settings: dict[str, Any], name: str, default: str) -> str:
  """A special token's text, stored as a string or as an AddedToken's fields."""
  token = settings.get(name) or default
  return token["content"] if isinstance(token, dict) else token


def _word_piece(folder: Path) -> tokenizers.Tokenizer:
  """BERT's tokenizer; defaults are those of transformers' BertTokenizer."""
  settings = _tokenizer_config(folder)
  unk, sep, pad, cls, mask = (
    _special(settings, f"{name}_token", f"[{name.upper()}]")
    for name in ("unk", "sep", "pad", "cls", "mask")
  )
  vocab = models.WordPiece.read_file(str(folder / "vocab.txt"))
  tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unk))
  tokenizer.normalizer = normalizers.BertNormalizer(
    clean_text=True,
    handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    strip_accents=settings.get("strip_accents"),
    lowercase=settings.get("do_lower_case", True),
  )
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece()
  if missing := [token for token in (unk, cls, sep) if token not in vocab]:
    file = folder / "vocab.txt"
    raise LoraxError(f"{file} has no {listing(missing)}: it can't be BERT's vocabulary")
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"{cls}:0 $A:0 {sep}:0",
    pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
    special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
  )
  # Only tokens of the vocabulary: another would get an id beyond the embedding.
  tokenizer.add_special_tokens([t for t in (unk, sep, pad, cls, mask) if t in vocab])
  return tokenizer


def _byte_level(folder: Path) -> tokenizers.Tokenizer:
  """RoBERTa's or GPT-2's tokenizer."""
  settings = _tokenizer_config(folder)
  vocab, merges = models.BPE.read_file(
    str(folder / "vocab.json"), str(folder / "merges.txt")
  )
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
  space = settings.get("add_prefix_space", False)
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
  tokenizer.decoder = decoders.ByteLevel()
  cls = _special(settings, "cls_token", "<s>")
  sep = _special(settings, "sep_token", "</s>")
  plain: list[str]
  if cls in vocab and sep in vocab:
    tokenizer.post_processor = processors.RobertaProcessing(
      (sep, vocab[sep]), (cls, vocab[cls]), trim_offsets=True, add_prefix_space=space
    )
    plain = [cls, sep, _special(settings, "pad_token", "<pad>")]
    plain.append(_special(settings, "unk_token", "<unk>"))
  else:
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    plain = [_special(settings, "eos_token", "<|endoftext|>")]
  tokenizer.add_special_tokens([token for token in plain if token in vocab])
  mask = settings.get("mask_token") or "<mask>"
  # RoBERTa's mask strips the space before it, if set so.
  fields = {"content": mask} if isinstance(mask, str) else mask
  if fields["content"] in vocab:
    mask_token = tokenizers.AddedToken(
      fields["content"], lstrip=fields.get("lstrip", False)
    )
    tokenizer.add_special_tokens([mask_token])
  return tokenizer


_BUILDERS = {
  ("tokenizer.json",): lambda folder: tokenizers.Tokenizer.from_file(
    str(folder / "tokenizer.json")
  ),
  ("vocab.txt",): _word_piece,
  ("vocab.json", "merges.txt"): _byte_level,
}

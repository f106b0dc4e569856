"""transformers' classes of tokenizers: how each is built of a vocabulary.

As of transformers 5: a class that is named decides normalisation and splitting, and a
tokenizer.json beside it gives the vocabulary, and where the class has no ends of its
own, those. "TokenizersBackend" is a tokenizer.json as it is.
"""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from lorax_flax.data.tokenizers.settings import Settings
from lorax_flax.errors import LoraxError

SERIALIZED = "TokenizersBackend"
Option = Callable[[str, Any], Any]  # (name, default) -> value
Texts = Mapping[str, str]  # special tokens by name


@dataclass(frozen=True)
class Vocabulary:
  """The vocabulary of a tokenizer.

  Attributes:
    tokens: ids by token; or tokens with their scores (Unigram).
    merges: pairs, best first (BPE).
    charsmap: SentencePiece's normalisation.
  """

  tokens: Any
  merges: Sequence[tuple[str, str]] = ()
  charsmap: bytes | None = None


@dataclass(frozen=True)
class Class:
  """One class.

  Attributes:
    model: the kind of model, as a tokenizer.json names it.
    tokens: default special tokens by name.
    build: (vocabulary, options, special tokens) -> tokenizer without special tokens.
    files: of the vocabulary where there is no tokenizer.json; none: SentencePiece's,
      which is not read.
    ends: (special tokens) -> the special tokens around one text and around two, as
      TemplateProcessing has them; None takes tokenizer.json's, or bos and eos.
  """

  model: str
  tokens: Texts
  build: Callable[[Vocabulary, Option, Texts], tokenizers.Tokenizer]
  files: tuple[str, ...] = ()
  ends: Callable[[Texts], tuple[list[str], list[str]]] | None = None


def from_json(serialized: Mapping[str, Any], of: str, model: str) -> Vocabulary:
  """The vocabulary in a tokenizer.json.

  Raises:
    LoraxError: its model is of another kind than that of the class `of`.
  """
  stored = serialized.get("model") or {}
  if stored.get("type", model) != model:
    raise LoraxError(
      f"tokenizer.json holds a {stored['type']} model, and a {of} is a {model}: "
      f'"tokenizer_class": "PreTrainedTokenizerFast" reads the file as it is'
    )
  tokens = stored["vocab"]
  if model == "Unigram":
    tokens = [(piece, score) for piece, score in tokens]
  merges: list[Any] = [
    tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair)
    for pair in stored.get("merges", ())
  ]
  return Vocabulary(tokens, merges, _charsmap(serialized.get("normalizer")))


def from_files(folder: Path, kind: Class) -> Vocabulary:
  """The vocabulary in vocab.txt, or in vocab.json and merges.txt."""
  files = [str(folder / name) for name in kind.files]
  if kind.model == "WordPiece":
    return Vocabulary(models.WordPiece.read_file(*files))
  return Vocabulary(*models.BPE.read_file(*files))


def _charsmap(normalizer: Mapping[str, Any] | None) -> bytes | None:
  for step in (normalizer or {}).get("normalizers", [normalizer or {}]):
    if step.get("type") == "Precompiled" and step.get("precompiled_charsmap"):
      return base64.b64decode(step["precompiled_charsmap"])
  return None


def _bert(vocabulary, option, tokens):
  model = models.WordPiece(vocabulary.tokens, unk_token=tokens["unk_token"])
  made = tokenizers.Tokenizer(model)
  made.normalizer = normalizers.BertNormalizer(
    clean_text=True,
    handle_chinese_chars=option("tokenize_chinese_chars", True),
    strip_accents=option("strip_accents", None),
    lowercase=option("do_lower_case", True),
  )
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  made.decoder = decoders.WordPiece()
  return made


def _byte_level(vocabulary, option, tokens):
  made = tokenizers.Tokenizer(models.BPE(vocabulary.tokens, vocabulary.merges))
  space = option("add_prefix_space", False)
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
  made.decoder = decoders.ByteLevel()
  return made


_QWEN2 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _qwen2(vocabulary, option, tokens):
  made = tokenizers.Tokenizer(models.BPE(vocabulary.tokens, vocabulary.merges))
  made.normalizer = normalizers.NFC()
  space = option("add_prefix_space", False)
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False),
    ]
  )
  made.decoder = decoders.ByteLevel()
  return made


def _llama(vocabulary, option, tokens):
  model = models.BPE(
    vocabulary.tokens, vocabulary.merges, fuse_unk=True, byte_fallback=True
  )
  made = tokenizers.Tokenizer(model)
  space, scheme = option("add_prefix_space", True), "never"
  if space:
    scheme = "always" if option("legacy", False) else "first"
  made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
  steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  made.decoder = decoders.Sequence(
    [*steps, *([decoders.Strip(content=" ", left=1)] if space else [])]
  )
  return made


def _gemma(vocabulary, option, tokens):
  model = models.BPE(
    vocabulary.tokens,
    vocabulary.merges,
    fuse_unk=True,
    unk_token=tokens["unk_token"],
    byte_fallback=True,
  )
  made = tokenizers.Tokenizer(model)
  made.normalizer = normalizers.Replace(" ", "▁")
  made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
  made.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  return made


def _deberta(vocabulary, option, tokens):
  unk = (tokens["unk_token"], 0.0)
  pieces = vocabulary.tokens
  unk_id = pieces.index(unk) if unk in pieces else option("unk_id", 1)
  made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=unk_id))
  made.normalizer = normalizers.Sequence(
    [
      *([normalizers.Lowercase()] if option("do_lower_case", False) else []),
      normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " "),
      normalizers.NFC(),
      normalizers.Strip(left=False, right=True),
    ]
  )
  scheme = "always" if option("add_prefix_space", True) else "first"
  by_punctuation = option("split_by_punct", False)
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [
      *([pre_tokenizers.Punctuation("isolated")] if by_punctuation else []),
      pre_tokenizers.Metaspace(prepend_scheme=scheme),
    ]
  )
  made.decoder = decoders.Metaspace(prepend_scheme=scheme)
  return made


def _sentences(unk_id: int):
  """The build of XLM-R's and T5's Unigram."""

  def build(vocabulary, option, tokens):
    made = tokenizers.Tokenizer(models.Unigram(vocabulary.tokens, unk_id=unk_id))
    if vocabulary.charsmap is not None:
      made.normalizer = normalizers.Precompiled(vocabulary.charsmap)
    space = unk_id == _T5_UNK or option("add_prefix_space", True)
    scheme = "always" if space else "never"
    made.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Metaspace(prepend_scheme=scheme),
      ]
    )
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return made

  return build


_T5_UNK, _XLMR_UNK = 2, 3


def _bert_ends(t: Texts) -> tuple[list[str], list[str]]:
  cls, sep = t["cls_token"], t["sep_token"]
  single = [cls, "$A:0", sep]
  return single, [*single, "$B:1", f"{sep}:1"]


def _roberta_ends(t: Texts) -> tuple[list[str], list[str]]:
  cls, sep = t["cls_token"], t["sep_token"]
  return [cls, "$A", sep], [cls, "$A", sep, sep, "$B", sep]


def _xlmr_ends(t: Texts) -> tuple[list[str], list[str]]:
  return _roberta_ends({"cls_token": t["bos_token"], "sep_token": t["eos_token"]})


def _t5_ends(t: Texts) -> tuple[list[str], list[str]]:
  return ["$A", t["eos_token"]], ["$A", t["eos_token"], "$B", t["eos_token"]]


_BRACKETS = {
  f"{n}_token": f"[{n.upper()}]" for n in ("unk", "sep", "pad", "cls", "mask")
}
_ANGLES = {
  "bos_token": "<s>",
  "eos_token": "</s>",
  "unk_token": "<unk>",
  "sep_token": "</s>",
  "pad_token": "<pad>",
  "cls_token": "<s>",
  "mask_token": "<mask>",
}
_END_OF_TEXT = "<|endoftext|>"
_TWO_FILES = ("vocab.json", "merges.txt")

_BERT = Class("WordPiece", _BRACKETS, _bert, ("vocab.txt",), _bert_ends)
CLASSES: Mapping[str, Class] = {
  "BertTokenizer": _BERT,
  "DistilBertTokenizer": _BERT,
  "RobertaTokenizer": Class("BPE", _ANGLES, _byte_level, _TWO_FILES, _roberta_ends),
  "XLMRobertaTokenizer": Class(
    "Unigram", _ANGLES, _sentences(_XLMR_UNK), ends=_xlmr_ends
  ),
  "DebertaV2Tokenizer": Class(
    "Unigram",
    {**_BRACKETS, "bos_token": "[CLS]", "eos_token": "[SEP]"},
    _deberta,
    ends=_bert_ends,
  ),
  "GPT2Tokenizer": Class(
    "BPE",
    dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END_OF_TEXT),
    _byte_level,
    _TWO_FILES,
  ),
  "Qwen2Tokenizer": Class(
    "BPE",
    dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END_OF_TEXT),
    _qwen2,
    _TWO_FILES,
  ),
  "LlamaTokenizer": Class(
    "BPE", {n: _ANGLES[n] for n in ("unk_token", "bos_token", "eos_token")}, _llama
  ),
  "GemmaTokenizer": Class(
    "BPE",
    {
      "bos_token": "<bos>",
      "eos_token": "<eos>",
      **{n: _ANGLES[n] for n in ("unk_token", "pad_token", "mask_token")},
    },
    _gemma,
  ),
  "T5Tokenizer": Class(
    "Unigram",
    {n: _ANGLES[n] for n in ("eos_token", "unk_token", "pad_token")},
    _sentences(_T5_UNK),
    ends=_t5_ends,
  ),
}
# By model_type; of those that are not here, tokenizer.json is read as it is.
_OF_FAMILY = {
  "bert": "BertTokenizer",
  "distilbert": "BertTokenizer",
  "roberta": "RobertaTokenizer",
  "xlm-roberta": "XLMRobertaTokenizer",
  "deberta-v2": "DebertaV2Tokenizer",
  "gpt2": "GPT2Tokenizer",
  "t5": "T5Tokenizer",
  **dict.fromkeys(("qwen2", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
  **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "GemmaTokenizer"),
  **dict.fromkeys(("mistral", "mixtral", "phi3"), SERIALIZED),
}
# Families whose checkpoints name wrong classes: the family's is taken.
_OWN_CLASS = ("qwen2", "phi3", "mistral", "mixtral")
_AS_IT_IS = (SERIALIZED, "PreTrainedTokenizer", "PreTrainedTokenizerFast")


def class_of(model_type: str | None, settings: Settings) -> str:
  """The name of the class that transformers builds, `SERIALIZED` or one of `CLASSES`.

  Raises:
    LoraxError: one that is not built here.
  """
  own = _OF_FAMILY.get(model_type or "")
  name = settings.class_name
  if name is None or (own is not None and model_type in _OWN_CLASS):
    name = own or SERIALIZED
  if name in (each.removesuffix("Fast") for each in _AS_IT_IS):
    return SERIALIZED
  # Llama 3's checkpoints name Llama 2's class.
  if name == "LlamaTokenizer" and _is_byte_level(settings.serialized or {}):
    return SERIALIZED
  return name


def _is_byte_level(serialized: Mapping[str, Any]) -> bool:
  return any(
    '"ByteLevel"' in str(serialized.get(part)).replace("'", '"')
    for part in ("pre_tokenizer", "decoder")
  )


def texts_of(ends: tuple[list[str], list[str]]) -> set[str]:
  """The special tokens in the ends of texts."""
  return {part.removesuffix(":1") for part in ends[1] if not part.startswith("$")}


def template(ends: tuple[list[str], list[str]], tokenizer: tokenizers.Tokenizer) -> Any:
  """The post-processor that puts special tokens around one text or two."""
  single, pair = ends
  ids = [(text, tokenizer.token_to_id(text)) for text in texts_of(ends)]
  return processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def post_processor(serialized: Mapping[str, Any]) -> Any:
  """The post-processor of a tokenizer.json."""
  model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
  text = json.dumps({**serialized, "model": model, "added_tokens": []})
  return tokenizers.Tokenizer.from_str(text).post_processor

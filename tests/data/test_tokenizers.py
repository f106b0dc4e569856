"""Settings of tokenizers, by family: ids are transformers', or the setting is named."""

import json
from itertools import chain, pairwise

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lorax_flax.data import tokenize
from lorax_flax.data.tokenizers import tokenizer as tokenizer_module
from lorax_flax.errors import LoraxError

TEXTS = [
  "",
  " ",
  "the cat sees",
  " the  cat\tsees\n\n a Dog ",
  "Café naïve — “quotes”, 中文 ありがとう and émigrés; it's ISN'T",
  "[E1] in [e1] <e2>the<e2> [MASK] <mask> <s></s><|endoftext|> <|im_start|>[NEW]",
  "12345.67 https://x.y/z?a=b ½ ² \u00a0here \u200b\ufeff e\u0301",
  "🙂 emoji 👩‍👩‍👧 \x07 bell",
  "long " * 60,
]
PAIRS = [*pairwise(TEXTS[2:])]
WORDS = TEXTS * 3


def _bpe(special, *, spaces="byte"):
  """A BPE of few merges; over bytes, or over "▁" with bytes to fall back on."""
  made = tokenizers.Tokenizer(models.BPE(byte_fallback=spaces != "byte"))
  if spaces == "byte":
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
  else:
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = []
    special = [*special, *(f"<0x{i:02X}>" for i in range(256))]
  trainer = trainers.BpeTrainer(
    vocab_size=300 + len(special) + len(alphabet),
    special_tokens=special,
    initial_alphabet=alphabet,
    show_progress=False,
  )
  made.train_from_iterator(WORDS, trainer)
  return made


def _unigram(special):
  pieces = [*dict.fromkeys(chain.from_iterable(TEXTS)), "▁", "▁the", "▁cat", "▁long"]
  vocab = [(token, 0.0) for token in special]
  vocab += [(p, -2.0 - len(p) % 3) for p in pieces if p != " " and p not in special]
  return tokenizers.Tokenizer(models.Unigram(vocab, unk_id=special.index("<unk>")))


ANGLES = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def _write_bert(folder):
  letters = sorted({c for c in "".join(TEXTS).lower() if not c.isspace()})
  upper = sorted({c for c in "".join(TEXTS) if c.isupper()})
  pieces = [*BERT, "the", "cat", "see", *letters, *upper]
  pieces += [f"##{c}" for c in [*letters, *upper]]
  (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n")


def _write_bpe(special):
  return lambda folder: _bpe(special).model.save(str(folder))


def _write_json(make, *special, **options):
  """A tokenizer.json, whose ends may be of its own."""

  def write(folder):
    made = make(*special, **options)
    made.post_processor = processors.TemplateProcessing(
      single="<s> $A",
      pair="<s> $A <s> $B",
      special_tokens=[("<s>", made.token_to_id("<s>"))],
    )
    made.save(str(folder / "tokenizer.json"))

  return write


def _write_deberta(folder):
  vocab = [(token, 0.0) for token in ("[PAD]", "[CLS]", "[SEP]", "[UNK]")]
  pieces = [*dict.fromkeys(chain.from_iterable(TEXTS)), "▁", "▁the", "▁cat"]
  vocab += [(p, -2.0 - len(p) % 3) for p in pieces if p != " "] + [("[MASK]", 0.0)]
  tokenizers.Tokenizer(models.Unigram(vocab, unk_id=3)).save(
    str(folder / "tokenizer.json")
  )


# Of each: model_type, the class that its checkpoints name, and its files.
LLAMA = ["<unk>", "<s>", "</s>"]
FAMILIES = {
  "bert": ("bert", "BertTokenizer", _write_bert),
  "distilbert": ("distilbert", "DistilBertTokenizer", _write_bert),
  "roberta": ("roberta", "RobertaTokenizer", _write_bpe(ANGLES)),
  "roberta json": ("roberta", "RobertaTokenizer", _write_json(_bpe, ANGLES)),
  "gpt2": ("gpt2", "GPT2Tokenizer", _write_bpe(["<|endoftext|>"])),
  "gpt2 json": ("gpt2", "GPT2Tokenizer", _write_json(_bpe, ["<s>", "<|endoftext|>"])),
  "qwen2": ("qwen2", "Qwen2Tokenizer", _write_bpe(["<|endoftext|>"])),
  "qwen3 json": (
    "qwen3",
    "Qwen2Tokenizer",
    _write_json(_bpe, ["<s>", "<|endoftext|>"]),
  ),
  "llama": ("llama", "LlamaTokenizer", _write_json(_bpe, LLAMA, spaces="▁")),
  "llama 3": ("llama", "LlamaTokenizer", _write_json(_bpe, LLAMA)),
  "mistral": ("mistral", "LlamaTokenizer", _write_json(_bpe, LLAMA, spaces="▁")),
  "smollm3": ("smollm3", "PreTrainedTokenizerFast", _write_json(_bpe, LLAMA)),
  "phi3": ("phi3", "LlamaTokenizer", _write_json(_bpe, LLAMA, spaces="▁")),
  "gemma": (
    "gemma",
    "GemmaTokenizer",
    _write_json(
      _bpe, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<s>"], spaces="▁"
    ),
  ),
  "deberta": ("deberta-v2", "DebertaV2Tokenizer", _write_deberta),
  "xlm-roberta": ("xlm-roberta", "XLMRobertaTokenizer", _write_json(_unigram, ANGLES)),
  "t5": (
    "t5",
    "T5Tokenizer",
    _write_json(
      _unigram,
      ["<pad>", "</s>", "<unk>", "<s>", *(f"<extra_id_{i}>" for i in range(100))],
    ),
  ),
}
TOKEN = {"content": "[e1]", "lstrip": True, "rstrip": True, "normalized": False}
NEXT = object()  # stands for the first id after the vocabulary
SETTINGS = {
  "none": {},
  "no class": {"tokenizer_class": None},
  "added tokens": {"added_tokens.json": {"[e1]": NEXT}},
  "added tokens decoder": {
    "added_tokens_decoder": {NEXT: {**TOKEN, "single_word": False, "special": True}}
  },
  "special tokens": {"additional_special_tokens": ["[e1]", "<e2>"]},
  "special tokens map": {
    "special_tokens_map.json": {"pad_token": {"content": "[NEW]", "lstrip": True}}
  },
  "a pad token": {"pad_token": "[NEW]"},
  "a mask that strips": {"mask_token": {"__type": "AddedToken", **TOKEN}},
  "bos and eos": {
    "add_bos_token": True,
    "add_eos_token": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
  },
  "prefix space": {"add_prefix_space": True},
  "no prefix space": {"add_prefix_space": False},
  "casing": {"do_lower_case": False, "strip_accents": True},
  "lower case": {"do_lower_case": True, "split_by_punct": True},
  "left": {"truncation_side": "left"},
  "legacy": {"legacy": True},
  "split special tokens": {"split_special_tokens": True},
  "named tokens": {"image_token": "<e2>", "extra_special_tokens": {"x_token": "[e1]"}},
}


def _folder(folder, family, settings):
  """A folder of a family's files; returns transformers' tokenizer of it."""
  model_type, class_name, write = FAMILIES[family]
  folder.mkdir(exist_ok=True)
  write(folder)
  (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
  config = {"tokenizer_class": class_name}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  size = len(transformers.AutoTokenizer.from_pretrained(folder))
  numbered = {
    name: {k if k is not NEXT else str(size): v for k, v in value.items()}
    if isinstance(value, dict)
    else value
    for name, value in settings.items()
  }
  for name, value in numbered.items():
    if name.endswith(".json"):
      values = {k: size if v is NEXT else v for k, v in value.items()}
      (folder / name).write_text(json.dumps(values))
    else:
      config[name] = value
  config = {name: value for name, value in config.items() if value is not None}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return transformers.AutoTokenizer.from_pretrained(folder)


def _ids(peer, length):
  cut = {"truncation": "longest_first", "max_length": length}
  singles = [peer(text, **cut)["input_ids"] for text in TEXTS]
  return singles + [peer(*pair, **cut)["input_ids"] for pair in PAIRS]


def _ours(made, length):
  examples = [{"text": text} for text in TEXTS]
  examples += [{"text": a, "text_pair": b} for a, b in PAIRS]
  found = tokenize.tokenize(examples, made, max_length=length, token_types=False)
  ids, starts = found.input_ids_S.tolist(), found.offsets
  return [ids[a:b] for a, b in pairwise(starts)]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_transformers_ids(tmp_path, family, settings):
  peer = _folder(tmp_path / "base", family, SETTINGS[settings])
  made = tokenize.load_tokenizer(tmp_path / "base")
  for length in (9, 512):
    for text, got, want in zip(
      [*TEXTS, *PAIRS], _ours(made, length), _ids(peer, length), strict=True
    ):
      assert got == want, (text, made.backend.decode(got), peer.decode(want))
  for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
    assert made.id_of(name) == getattr(peer, f"{name}_id")
  assert made.decode(made.encode("the cat").ids) == peer.decode(
    peer("the cat")["input_ids"], skip_special_tokens=True
  )


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"tokenizer_class": "BertJapaneseTokenizer"}, "unknown tokenizer_class 'BertJap"),
    ({"tokenizer_class": "HerbertTokenizerFast"}, "unknown tokenizer_class 'Herbert"),
    ({"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "auto_map"),
    ({"fix_mistral_regex": True}, "fix_mistral_regex"),
    ({"truncation_side": "middle"}, "truncation_side 'middle'"),
    ({"added_tokens_decoder": {"999": TOKEN}}, r"'\[e1\]' has the id 999"),
    ({"pad_token": 3}, "pad_token: 3 is no token"),
  ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path, settings, message):
  _folder(tmp_path / "base", "bert", {})
  file = tmp_path / "base/tokenizer_config.json"
  file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
  with pytest.raises(LoraxError, match=message):
    tokenize.load_tokenizer(tmp_path / "base")


def test_an_adapters_own_tokenizer_takes_the_place_of_the_bases(tmp_path):
  _folder(tmp_path / "base", "bert", {})
  peer = _folder(tmp_path / "adapter", "bert", SETTINGS["added tokens"])
  (tmp_path / "adapter/config.json").unlink()
  made = tokenizer_module.load(tmp_path / "base", tmp_path / "adapter")
  assert _ours(made, 512) == _ids(peer, 512)
  (tmp_path / "adapter/vocab.txt").unlink()
  base = tokenizer_module.load(tmp_path / "base")
  made = tokenizer_module.load(tmp_path / "base", tmp_path / "adapter")
  assert _ours(made, 512) == _ours(base, 512) != _ids(peer, 512)


def test_token_types_are_zeros_where_the_model_takes_none(tmp_path):
  _folder(tmp_path / "base", "bert", {"model_input_names": ["input_ids"]})
  made = tokenize.load_tokenizer(tmp_path / "base")
  pair = [{"text": "a", "text_pair": "b"}]
  rows = tokenize.tokenize(pair, made, max_length=9, token_types=True)
  assert not rows.token_type_ids_S.any()


@pytest.mark.parametrize(
  "example", [{"text": "a \ud800"}, {"text": "a", "text_pair": "\udc00"}]
)
def test_half_of_a_surrogate_pair_is_named_with_its_example(tmp_path, example):
  _folder(tmp_path / "base", "bert", {})
  made = tokenize.load_tokenizer(tmp_path / "base")
  with pytest.raises(LoraxError, match=r"example 2: the text holds .*surrogate pair"):
    tokenize.tokenize([{"text": "b"}, example], made, max_length=9, token_types=False)

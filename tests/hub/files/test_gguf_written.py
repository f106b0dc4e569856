"""GGUF files that are written, against the gguf package, transformers and ourselves."""

import gguf
import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders as token_decoders
from tokenizers import models, normalizers, pre_tokenizers

from experiments.convert import convert
from experiments.merge import merge
from lorax_flax.adapt.paths import flatten
from lorax_flax.data.chat import files as chat_files
from lorax_flax.data.tokenize import load_tokenizer
from lorax_flax.errors import LoraxError
from lorax_flax.hub import provenance
from lorax_flax.hub.adapters import any as adapters
from lorax_flax.hub.checkpoints import export_gguf
from lorax_flax.hub.files import gguf as hub_gguf
from lorax_flax.hub.files import gguf_blocks, gguf_tokenizer, gguf_vocabulary
from lorax_flax.models import gguf as model_gguf
from lorax_flax.models import registry, with_adapter
from tests.experiments import peers
from tests.hub.files import test_gguf
from tests.models import decoders, family

Kind = gguf.GGMLQuantizationType
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 100.0,
  "factor": 4.0,
  "low_freq_factor": 0.25,
  "high_freq_factor": 1.0,
  "original_max_position_embeddings": 16,
}
GEMMA = {**HEADS, "head_dim": 10, "sliding_window": 4}
# Of each: transformers' class, its config, llama.cpp's architecture.
PEERS = {
  "llama": ("Llama", {**HEADS, "attention_bias": True, "rope_parameters": LLAMA3}),
  "mistral": ("Mistral", {**HEADS, "head_dim": 6, "sliding_window": None}),
  "qwen2": ("Qwen2", HEADS),
  "qwen3": ("Qwen3", {**HEADS, "head_dim": 10}),
  "gemma": ("Gemma", {**HEADS, "head_dim": 6}),
  "gemma2": ("Gemma2", {**GEMMA, "query_pre_attn_scalar": 10}),
  "gemma3_text": (
    "Gemma3",
    {
      **GEMMA,
      "num_hidden_layers": 6,
      "query_pre_attn_scalar": 10,
      "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
      },
    },
  ),
  "phi3": (
    "Phi3",
    {
      **HEADS,
      "sliding_window": 6,
      "original_max_position_embeddings": 9,
      "rope_parameters": {
        "rope_type": "longrope",
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
      },
    },
  ),
  "gpt2": ("GPT2LMHead", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 23}),
}
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}


def saved(name, folder):
  kind, fields = PEERS[name]
  if name != "gpt2":
    return decoders.Peer(kind, fields).save(folder)
  config = transformers.GPT2Config(vocab_size=37, initializer_range=0.3, **fields)
  return family.save(folder, transformers.GPT2LMHeadModel(config))


def written(loaded, folder, dtype=None):
  """A model's file, without a tokenizer."""
  described = model_gguf.describe(loaded)
  export_gguf.write(
    folder,
    loaded.params,
    loaded.keymap,
    described.architecture,
    described.config,
    metadata=described.metadata,
    tensors=described.tensors,
    dtype=dtype,
    card="",
    overwrite=False,
  )
  return folder / export_gguf.FILE


def permuted(value, heads):
  """llama.cpp's converter's permutation of queries and keys."""
  parts = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
  return parts.swapaxes(1, 2).reshape(value.shape)


def expected(model):
  """Tensors as llama.cpp's converter has them, by the gguf package's names."""
  config = model.config
  name = ARCHITECTURES.get(config.model_type, config.model_type)
  arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == name)
  names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
  found = {}
  for key, tensor in model.state_dict().items():
    if key == "lm_head.weight" and config.tie_word_embeddings:
      continue
    value = tensor.numpy()
    if name == "llama" and ".q_proj" in key:
      value = permuted(value, 4)
    if name == "llama" and ".k_proj" in key:
      value = permuted(value, 2)
    if "gemma" in name and key.endswith("norm.weight"):
      value = value + 1
    if name == "gpt2" and key.split(".")[-2] in ("c_attn", "c_proj", "c_fc"):
      value = value.T
    found[names.get_name(key, try_suffixes=(".weight", ".bias"))] = value
  return found


@pytest.fixture(scope="module")
def models_of(tmp_path_factory):
  """transformers' model, ours, and our GGUF file, by family; each is made once."""
  made = {}

  def get(name):
    if name not in made:
      folder = tmp_path_factory.mktemp(name)
      model = saved(name, folder / "source")
      loaded = registry.load(folder / "source")
      made[name] = model, loaded, written(loaded, folder / "out")
    return made[name]

  return get


@pytest.mark.parametrize("name", PEERS)
def test_names_and_values_are_those_of_llama_cpps_converter(models_of, name):
  model, _, path = models_of(name)
  reader = gguf.GGUFReader(path)
  got = {each.name: each.data for each in reader.tensors}
  factors = {each for each in got if each.startswith("rope_")}
  assert len(factors) == {"llama": 1, "phi3": 2}.get(name, 0)
  want = expected(model)
  assert got.keys() - factors == want.keys()
  for key in want:
    np.testing.assert_array_equal(got[key], want[key], err_msg=key)
  architecture = ARCHITECTURES.get(name, name)
  assert reader.fields["general.architecture"].contents() == architecture
  assert reader.fields[f"{architecture}.block_count"].contents() == len(
    {each.split(".")[1] for each in got if each.startswith("blk.")}
  )


@pytest.mark.parametrize("name", PEERS)
def test_a_written_file_is_the_same_model(models_of, name):
  _, loaded, path = models_of(name)
  again = registry.load(path)
  got, want = flatten(again.params), flatten(loaded.params)
  assert got.keys() == want.keys()
  for key in want:
    # The file has a Gemma's scale plus one: what float32 rounds off is lost.
    is_offset = "gemma" in name and key.endswith("/scale")
    np.testing.assert_allclose(got[key], want[key], rtol=0, atol=1e-7 * is_offset)
  if "gemma" not in name:
    # The digests don't know in which kind of file the numbers are.
    digests = [provenance.sampled(registry.stored(x.folder)) for x in (again, loaded)]
    assert digests[0] == digests[1]
  logits = [family.logits(each, decoders.BATCH) for each in (again, loaded)]
  picked = decoders.real(decoders.BATCH)
  np.testing.assert_allclose(logits[0][picked], logits[1][picked], atol=2e-5)
  assert np.abs(logits[0]).max() > 0.1


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_transformers_reads_a_written_file_to_the_same_logits(models_of, name):
  _, loaded, path = models_of(name)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  ).eval()
  got = family.torch_logits(model, decoders.BATCH)
  want = family.logits(loaded, decoders.BATCH)
  picked = decoders.real(decoders.BATCH)
  np.testing.assert_allclose(got[picked], want[picked], atol=1e-4)


def test_llama_3s_factors_are_the_converters(models_of):
  path = models_of("llama")[2]
  (got,) = (t.data for t in gguf.GGUFReader(path).tensors if "rope" in t.name)
  waves = 2 * np.pi * 100.0 ** (np.arange(0, 8, 2) / 8)
  smooth = (16 / waves - 0.25) / 0.75
  between = 1 / ((1 - smooth) / 4 + smooth)
  want = np.where(waves < 16, 1, np.where(waves > 64, 4, between))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert len(set(got.tolist())) > 2


@pytest.mark.parametrize(
  ("dtype", "kind"), [("f16", Kind.F16), ("bf16", Kind.BF16), ("q8_0", Kind.Q8_0)]
)
def test_matrices_have_the_kind_asked_for_and_vectors_stay(tmp_path, dtype, kind):
  fields = {**HEADS, "intermediate_size": 64}
  decoders.Peer("Qwen2", fields).save(tmp_path / "source")
  loaded = registry.load(tmp_path / "source")
  path = written(loaded, tmp_path / "out", dtype)
  reader = gguf.GGUFReader(path)
  kinds = {each.name: each.tensor_type for each in reader.tensors}
  assert {kinds[n] for n in kinds if "norm" in n or "bias" in n} == {Kind.F32}
  assert {kinds[n] for n in kinds if n.endswith("weight") and "norm" not in n} == {kind}
  value = np.asarray(flatten(loaded.params)["model/layer_1/mlp/up_proj/kernel"]).T
  want = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
  got = hub_gguf.open_file(path)["model.layers.1.mlp.up_proj.weight"]
  np.testing.assert_array_equal(got.astype(np.float32), want)
  assert (
    reader.fields["general.file_type"].contents()
    == {
      Kind.F16: 1,
      Kind.BF16: 32,
      Kind.Q8_0: 7,
    }[kind]
  )


@pytest.mark.parametrize(
  ("name", "fields", "says"),
  [
    ("SmolLM3", {}, r"unknown model family 'smollm3'.*gemma3_text, gpt2, llama"),
    (
      "Gemma2",
      {**GEMMA, "query_pre_attn_scalar": 3},
      r"query_pre_attn_scalar=3 .*its gemma2, which has 10",
    ),
    (
      "Gemma2",
      {**GEMMA, "query_pre_attn_scalar": 10, "layer_types": ["full_attention"] * 2},
      r"gemma2 needs sliding_window, which is null",
    ),
    (
      "Gemma3",
      {**GEMMA, "query_pre_attn_scalar": 10, "sliding_window_pattern": 2},
      r"windows of layers=\(4, None\) .* \(4, 4\)",
    ),
    ("Qwen3", {**HEADS, "attention_bias": True}, r"attention_bias=True .*qwen3"),
    (
      "Qwen2",
      {**HEADS, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
      r"rope_type='yarn' .*'linear'",
    ),
  ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(
  tmp_path, name, fields, says
):
  decoders.Peer(name, fields).save(tmp_path / "source")
  with pytest.raises(LoraxError, match=says):
    model_gguf.describe(registry.outline(registry.read_config(tmp_path / "source")))


def test_a_window_that_llama_cpp_lacks_bounds_the_context(tmp_path):
  decoders.Peer("Mistral", {**HEADS, "sliding_window": 9}).save(tmp_path)
  described = model_gguf.describe(registry.outline(registry.read_config(tmp_path)))
  assert described.metadata["llama.context_length"] == 9


# Tokenizers.


def sentencepiece():
  """BPE with a fallback to bytes, as SentencePiece's are in a tokenizer.json."""
  words = ["▁", *"abcdehi", "th", "▁th", "the", "▁the", "ab"]
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
  merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("th", "e"), ("a", "b")]
  vocab = {token: i for i, token in enumerate([*tokens, "t"])}
  model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
  made = tokenizers.Tokenizer(model)
  made.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  made.decoder = token_decoders.Sequence(
    [token_decoders.Replace("▁", " "), token_decoders.ByteFallback()]
  )
  made.add_special_tokens(["<unk>", "<s>", "</s>"])
  return made


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_a_sentencepiece_tokenizer_comes_back(tmp_path):
  tokenizer = sentencepiece()
  found = gguf_vocabulary.metadata(tokenizer, SPECIAL, {"default": "x"}, 280)
  assert found["tokenizer.ggml.model"] == "llama"
  assert not found["tokenizer.ggml.add_bos_token"]
  types = found["tokenizer.ggml.token_type"]
  assert types[:4] == [2, 3, 3, 6]
  assert types[-1] == 5, "a row without a token"
  scores = dict(
    zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True)
  )
  assert scores["th"] > scores["▁th"] > scores["the"] > scores["ab"] > scores["a"]
  path = test_gguf.write(tmp_path / "a.gguf", {}, found)
  again = gguf_tokenizer.load(path)
  for text in (*test_gguf.TEXTS, "the ab  the", "thethe abba é"):
    want = tokenizer.encode(text).ids
    assert again.encode(text).ids == want, text
    assert again.decode(want) == text


def test_a_byte_level_tokenizer_comes_back_and_others_are_refused(tmp_path):
  model = decoders.Peer("Llama", {**test_gguf.SIZES}).save(tmp_path / "source")
  for split in gguf_tokenizer.SPLITTINGS:
    said = test_gguf.values(model, **{"tokenizer.ggml.pre": split})
    path = test_gguf.write(tmp_path / f"{split}.gguf", {}, said)
    tokenizer, special = gguf_tokenizer.load(path), gguf_tokenizer.special(path)
    found = gguf_vocabulary.metadata(tokenizer, special, {}, 300)
    for key in found.keys() - {"tokenizer.ggml.add_bos_token"}:
      assert found[key] == said.get(key, False), key
    assert found["tokenizer.ggml.add_bos_token"] == (split == "llama-bpe")
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  with pytest.raises(LoraxError, match=r"Whitespace.*gpt-2, llama-bpe, qwen2, smollm"):
    gguf_vocabulary.metadata(tokenizer, special, {}, 300)
  with pytest.raises(LoraxError, match=r"ids up to 299, and the model 37 rows"):
    gguf_vocabulary.metadata(tokenizer, special, {}, 37)


# The commands.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A Llama in a GGUF file with a tokenizer."""
  folder = tmp_path_factory.mktemp("base")
  model = decoders.Peer("Llama", test_gguf.SIZES).save(folder / "source")
  tensors = test_gguf.stored(model, Kind.F32)
  test_gguf.write(folder / "base.gguf", tensors, test_gguf.values(model))
  return folder / "base.gguf"


def adapted(base, folder, **options):
  usual = {"modules_to_save": None, "target_modules": ["q_proj", "k_proj", "down_proj"]}
  model = transformers.LlamaForCausalLM.from_pretrained(base.parent / "source")
  return peers.adapt(model, folder, **usual | options)


def test_merge_writes_a_gguf_file_of_the_merged_model(base, tmp_path):
  peer = adapted(base, tmp_path / "adapter").merge_and_unload()
  merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "out"), "gguf")
  path = tmp_path / "out" / export_gguf.FILE
  got = {each.name: each.data for each in gguf.GGUFReader(path).tensors}
  want = test_gguf.stored(peer, Kind.F32)
  assert got.keys() == want.keys()
  for key, (value, _) in want.items():
    np.testing.assert_allclose(got[key], value, atol=1e-6, err_msg=key)
  for text in test_gguf.TEXTS:
    assert (
      load_tokenizer(path).encode(text).ids == load_tokenizer(base).encode(text).ids
    )
  assert chat_files.texts(path) == chat_files.texts(base) != {}


def test_merge_refuses_before_it_writes(base, tmp_path):
  adapted(base, tmp_path / "adapter")
  args = str(base), str(tmp_path / "adapter"), str(tmp_path / "out")
  with pytest.raises(LoraxError, match=r"unknown --dtype 'q4_0'.*q8_0"):
    merge(*args, "gguf", dtype="q4_0")
  with pytest.raises(LoraxError, match="goes with --format=gguf"):
    merge(*args, dtype="f16")
  with pytest.raises(LoraxError, match="did you mean 'gguf'"):
    merge(*args, "guf")
  peers.tiny("t5", tmp_path / "t5")
  model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "t5")
  peers.adapt(model, tmp_path / "t5_adapter")
  with pytest.raises(LoraxError, match="unknown model family 't5'"):
    merge(str(tmp_path / "t5"), str(tmp_path / "t5_adapter"), args[-1], "gguf")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_adapter_goes_to_gguf_and_back(base, tmp_path, rslora):
  options = {"rank_pattern": {"k_proj": 5}, "lora_alpha": 7, "use_rslora": rslora}
  model = adapted(base, tmp_path / "adapter", **options)
  convert(str(base), str(tmp_path / "adapter"), str(tmp_path / "out"), "gguf")
  reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
  fields = {name: field.contents() for name, field in reader.fields.items()}
  assert fields["general.type"] == "adapter"
  assert fields["adapter.type"] == "lora"
  assert fields["general.architecture"] == "llama"
  tensors = {each.name: each.data for each in reader.tensors}
  assert len(tensors) == 2 * 3 * 2
  layers = model.base_model.model.model.layers
  # The delta, as llama.cpp forms it, is PEFT's with its rows permuted.
  for name, module, heads in (
    ("attn_q", "self_attn.q_proj", 4),
    ("attn_k", "self_attn.k_proj", 2),
    ("ffn_down", "mlp.down_proj", None),
  ):
    a, b = (tensors[f"blk.1.{name}.weight.lora_{x}"] for x in "ab")
    want = layers[1].get_submodule(module).get_delta_weight("default").detach().numpy()
    want = want if heads is None else permuted(want, heads)
    scale = fields["adapter.lora.alpha"] / b.shape[1]
    np.testing.assert_allclose(scale * b @ a, want, atol=1e-5, err_msg=name)
  for source in (tmp_path / "out", tmp_path / "out" / "adapter.gguf"):
    assert adapters.form(source) == "gguf"
    _, back = with_adapter.load(str(base), source)
  _, first = with_adapter.load(str(base), tmp_path / "adapter")
  assert back.adapter.keys() == first.adapter.keys()
  for path, delta in first.adapter.items():
    got = back.adapter[path]
    deltas = [each.scale * np.asarray(each.a @ each.b) for each in (got, delta)]
    np.testing.assert_allclose(*deltas, atol=1e-5, err_msg=path)


def test_a_lora_on_token_embeddings_is_looked_up_by_token(base, tmp_path):
  model = adapted(base, tmp_path / "adapter", target_modules=["embed_tokens"])
  convert(str(base), str(tmp_path / "adapter"), str(tmp_path / "out"), "gguf")
  reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
  tensors = {each.name: each.data for each in reader.tensors}
  a, b = (tensors[f"token_embd.weight.lora_{x}"] for x in "ab")
  scale = reader.fields["adapter.lora.alpha"].contents() / b.shape[1]
  module = model.base_model.model.model.embed_tokens
  want = module.get_delta_weight("default").detach().numpy()
  np.testing.assert_allclose(scale * a @ b.T, want, atol=1e-5)
  both = [with_adapter.load(str(base), tmp_path / x)[1] for x in ("adapter", "out")]
  jax.tree.map(np.testing.assert_array_equal, *(each.adapter for each in both))
  # A tied table is multiplied with too, for which its LoRA has the wrong order.
  fields = {**test_gguf.SIZES, "tie_word_embeddings": True}
  tied = decoders.Peer("Llama", fields).save(tmp_path / "tied")
  options = {"modules_to_save": None, "target_modules": ["embed_tokens"]}
  peers.adapt(tied, tmp_path / "tied_adapter", **options)
  args = [str(tmp_path / x) for x in ("tied", "tied_adapter", "none")]
  with pytest.raises(LoraxError, match=r"applies no LoRA to model\.embed_tokens"):
    convert(*args, "gguf")


def test_gpt2s_conv1d_goes_to_gguf_and_back(tmp_path):
  peers.tiny("gpt2", tmp_path / "base")
  model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
  model = peers.adapt(model, tmp_path / "adapter")
  convert(*(str(tmp_path / x) for x in ("base", "adapter", "out")), "gguf")
  reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
  tensors = {each.name: each.data for each in reader.tensors}
  module = model.base_model.model.transformer.h[1].attn.c_attn
  a, b = (tensors[f"blk.1.attn_qkv.weight.lora_{x}"] for x in "ab")
  scale = reader.fields["adapter.lora.alpha"].contents() / b.shape[1]
  # GPT-2's matrices are (in, out) in Hugging Face's checkpoints, (out, in) in GGUF.
  want = module.get_delta_weight("default").detach().numpy().T
  np.testing.assert_allclose(scale * b @ a, want, atol=1e-5)
  both = [
    with_adapter.load(str(tmp_path / "base"), tmp_path / x)[1]
    for x in ("adapter", "out")
  ]
  assert jax.tree.structure(both[0].adapter) == jax.tree.structure(both[1].adapter)
  jax.tree.map(np.testing.assert_array_equal, *(each.adapter for each in both))


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"use_dora": True}, r"q_proj/kernel has a DoRA"),
    ({"lora_bias": True, "target_modules": ["q_proj"]}, "has a BiasLoRA"),
    ({"modules_to_save": ["lm_head"]}, r"lm_head/kernel has a Tuned"),
  ],
)
def test_an_adapter_that_llama_cpp_has_no_form_for_is_refused(tmp_path, options, says):
  peers.tiny("llama", tmp_path / "base")
  model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
  peers.adapt(model, tmp_path / "adapter", **{"modules_to_save": None, **options})
  with pytest.raises(LoraxError, match=says):
    convert(*(str(tmp_path / x) for x in ("base", "adapter", "out")), "gguf")
  assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_or_of_damaged_metadata_is_refused(base, tmp_path):
  adapted(base, tmp_path / "adapter")
  convert(str(base), str(tmp_path / "adapter"), str(tmp_path / "out"), "gguf")
  peers.tiny("gpt2", tmp_path / "gpt2")
  with pytest.raises(LoraxError, match=r"unknown base 'gpt2'.*llama, mistral"):
    with_adapter.load(str(tmp_path / "gpt2"), tmp_path / "out")
  with pytest.raises(LoraxError, match=r"holds no model: its general\.type is 'adap"):
    registry.load(tmp_path / "out" / "adapter.gguf")
  said = {"general.type": "adapter", "adapter.type": "control_vector"}
  path = test_gguf.write(tmp_path / "b.gguf", {}, said)
  with pytest.raises(LoraxError, match=r"adapter\.type is 'control_vector'"):
    with_adapter.load(str(base), path)


# Quantised blocks.


@pytest.mark.parametrize("name", gguf_blocks.QUANTISED)
def test_every_quantisation_is_dequantised_as_the_gguf_package_does(
  base, tmp_path, name
):
  kind = Kind[name]
  block, size = gguf.GGML_QUANT_SIZES[kind]
  rng = np.random.default_rng(0)
  shape = 8, 512
  data = rng.integers(0, 256, (8, 512 // block * size), np.uint8)
  table = np.ones((300, 64), np.float32)
  source = transformers.LlamaConfig.from_pretrained(base.parent / "source")
  peer = type("Model", (), {"config": source})
  tensors = {
    "token_embd.weight": (table, Kind.F32),
    "blk.0.ffn_up.weight": (data, kind),
    "blk.0.attn_q.weight": (data, kind),
  }
  path = test_gguf.write(tmp_path / "a.gguf", tensors, test_gguf.values(peer))
  with np.errstate(all="ignore"):
    want = gguf.quants.dequantize(data, kind)
  assert want.shape == shape
  reader = hub_gguf.open_file(path)
  key = "model.layers.0.mlp.up_proj.weight"
  np.testing.assert_array_equal(reader[key], want)
  cut = slice(3, 7), slice(100, 300)
  np.testing.assert_array_equal(reader.part(key, cut), want[cut])
  rows = want.reshape(4, 1, 2, 512).swapaxes(1, 2).reshape(shape)
  np.testing.assert_array_equal(reader["model.layers.0.self_attn.q_proj.weight"], rows)


def test_a_quantisation_that_is_not_read_is_refused_by_name(base, tmp_path):
  source = transformers.LlamaConfig.from_pretrained(base.parent / "source")
  peer = type("Model", (), {"config": source})
  tensors = {
    "token_embd.weight": (np.ones((300, 64), np.float32), Kind.F32),
    "blk.0.ffn_up.weight": (np.zeros((8, 40), np.uint8), Kind.Q8_1),
  }
  path = test_gguf.write(tmp_path / "a.gguf", tensors, test_gguf.values(peer))
  says = r"'blk\.0\.ffn_up\.weight' is not read: unknown quantisation 'Q8_1'.*Q4_K"
  with pytest.raises(LoraxError, match=says):
    registry.load(path)

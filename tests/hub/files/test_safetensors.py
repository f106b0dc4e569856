"""Reading weights: what torch wrote, and what is damaged."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lorax_flax as lx
from lorax_flax.hub.files import safetensors
from lorax_flax.models import registry
from tests.models import peers

INDEX = "model.safetensors.index.json"
DTYPES = ("float32", "float16", "bfloat16", "float64", "int64")


@pytest.fixture
def folder(tmp_path):
  """One file with two tensors, 68 bytes of data."""
  tensors = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5.0)}
  save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
  return tmp_path


def shard(folder, weight_map):
  """Makes the one file a shard of an index."""
  (folder / "model.safetensors").rename(folder / "one.safetensors")
  text = weight_map if isinstance(weight_map, str) else json.dumps(weight_map)
  (folder / INDEX).write_text(text)


def read_all(folder):
  return {key: value.copy() for key, value in safetensors.open_folder(folder).items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_reads_as_torch_wrote_it(tmp_path, dtype):
  value = (torch.randn(3, 5) * 100).to(getattr(torch, dtype))
  save_file({"x": value}, tmp_path / "model.safetensors")
  reader = safetensors.open_folder(tmp_path)
  assert reader.shape("x") == (3, 5)
  assert reader["x"].dtype.name == dtype
  np.testing.assert_array_equal(reader["x"].astype(np.float64), value.double().numpy())


def test_a_shape_is_known_without_reading_the_tensor(folder, monkeypatch):
  reader = safetensors.open_folder(folder)
  monkeypatch.setattr(
    safetensors.Reader, "__getitem__", lambda *_: pytest.fail("a tensor was read")
  )
  assert {key: reader.shape(key) for key in reader} == {"a": (3, 4), "b": (5,)}


def test_shards_read_as_the_single_file_does(folder):
  want = read_all(folder)
  save_file({"b": torch.tensor(want["b"])}, folder / "two.safetensors")
  shard(folder, {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
  got = read_all(folder)
  assert got.keys() == want.keys()
  assert all(np.array_equal(got[key], want[key]) for key in want)


def test_an_unknown_key_names_the_nearest(folder):
  reader = safetensors.open_folder(folder)
  with pytest.raises(lx.LoraxError, match=r"unknown checkpoint key 'aa'.*'a'"):
    reader["aa"]


def test_a_file_cut_anywhere_is_an_error(folder):
  path = folder / "model.safetensors"
  whole = path.read_bytes()
  for size in range(len(whole)):
    path.write_bytes(whole[:size])
    with pytest.raises(lx.LoraxError, match="cannot read"):
      safetensors.open_folder(folder)
  path.write_bytes(whole + b"x")
  with pytest.raises(lx.LoraxError, match="cannot read"):
    safetensors.open_folder(folder)


def test_flipped_bits_read_or_are_an_error_and_nothing_else(folder):
  path = folder / "model.safetensors"
  whole = bytearray(path.read_bytes())
  header = struct.unpack("<Q", whole[:8])[0] + 8
  rng = np.random.default_rng(0)
  refused = 0
  for _ in range(400):
    damaged = bytearray(whole)
    damaged[rng.integers(header)] ^= 1 << int(rng.integers(8))
    path.write_bytes(damaged)
    try:
      read_all(folder)
    except lx.LoraxError:
      refused += 1
  assert refused > 200


def test_a_huge_declared_shape_is_an_error_at_once(tmp_path):
  entry = {"dtype": "F32", "shape": [10**10, 10**9], "data_offsets": [0, 4]}
  header = json.dumps({"a": entry}).encode()
  data = struct.pack("<Q", len(header)) + header + b"1234"
  (tmp_path / "model.safetensors").write_bytes(data)
  with pytest.raises(lx.LoraxError, match="cannot read"):
    safetensors.open_folder(tmp_path)


def test_eight_bit_floats_are_refused_by_name(tmp_path):
  save_file(
    {"q": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors"
  )
  with pytest.raises(lx.LoraxError, match=r"cannot read 'q'"):
    safetensors.open_folder(tmp_path)["q"]


@pytest.mark.parametrize(
  ("index", "message"),
  [
    ({"weight_map": {"a": "../one.safetensors"}}, "not a file of its folder"),
    ({"weight_map": {"a": "/etc/passwd"}}, "not a file of its folder"),
    ({"weight_map": {"a": "sub/one.safetensors"}}, "not a file of its folder"),
    ({"weight_map": {"a": ".."}}, "not a file of its folder"),
    ({"weight_map": {"a": "oen.safetensors"}}, "did you mean 'one.safetensors'"),
    ({"weight_map": {"a": "one\0"}}, "unknown shard"),
    ({"weight_map": {"c": "one.safetensors"}}, "unknown weight of .* 'c'"),
    ({"weight_map": ["a"]}, "no index of shards"),
    ({"weight_map": None}, "no index of shards"),
    ({"weight_map": {"a": 1}}, "no index of shards"),
    ([], r"index\.json holds no JSON object"),
    ("{", r"cannot read .*index\.json"),
    ("[" * 100_000, r"cannot read .*index\.json: too many brackets"),
    ('{"weight_map": {"a": "one.safetensors", "a": "b"}}', "'a' is there twice"),
  ],
)
def test_a_bad_index_is_an_error(folder, index, message):
  shard(folder, index)
  with pytest.raises(lx.LoraxError, match=message):
    safetensors.open_folder(folder)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"x")
  with pytest.raises(lx.LoraxError, match=r"pytorch_model.bin.*safe_serialization"):
    safetensors.open_folder(tmp_path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
  (tmp_path / "weights.h5").write_bytes(b"x")
  with pytest.raises(lx.LoraxError, match=r"weights\.h5"):
    safetensors.open_folder(tmp_path)


def test_integer_weights_are_not_taken_for_floats(tmp_path):
  model = peers.save(tmp_path)
  tensors = {k: (100 * v).to(torch.int8) for k, v in model.state_dict().items()}
  save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(lx.LoraxError, match=r"int8.*quantised"):
    registry.load(tmp_path)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('{"model_type": []}', r"unknown model family '\[\]'"),
    ('{"model_type": "brt"}', "did you mean 'bert'"),
    ('{"model_type": "bert", "num_hidden_layers": 1000000000}', "from 1 to 1000"),
    ('{"model_type": "bert", "vocab_size": 1000000000000}', "vocab_size"),
    ("[" * 100_000, "cannot read"),
    ("[]", "no JSON object"),
  ],
)
def test_a_bad_config_is_an_error_at_once(folder, text, message):
  (folder / "config.json").write_text(text)
  with pytest.raises(lx.LoraxError, match=message):
    registry.load(folder)


@pytest.mark.parametrize("option", ["dtype", "param_dtype"])
def test_a_mistyped_dtype_is_an_error_with_the_nearest(tmp_path, option):
  peers.save(tmp_path)
  with pytest.raises(lx.LoraxError, match="did you mean 'bfloat16'"):
    registry.load(tmp_path, **{option: "bflot16"})

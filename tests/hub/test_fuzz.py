"""Damaged files: what was read stays equal, or one LoraxError says what is wrong.

Every mutation follows from a fixed seed. A flipped bit in a tensor's numbers cannot be
noticed, so that headers and JSON files are damaged here, and files cut and lengthened.
"""

import gc
import json
import struct
import time
import tracemalloc

import numpy as np
import pytest
import torch

import lorax_flax as lx
from lorax_flax.adapt.paths import flatten
from lorax_flax.data.tokenize import load_tokenizer, tokenize
from lorax_flax.hub.files import safetensors
from lorax_flax.hub.peft import folder as hub_peft
from lorax_flax.models import registry
from tests.experiments import peers as tuned
from tests.models import peers


@pytest.fixture(autouse=True, scope="module")
def _fresh_garbage():
  """Leaves other tests' objects out of the collections that are timed here."""
  gc.collect()
  gc.freeze()
  yield
  gc.unfreeze()


SECONDS = 1.0  # of the processor: others may be at work on the machine
BYTES = 32 << 20  # what Python and numpy allocate at most
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
# In place of any value of any JSON file.
NASTY = (
  *(None, True, False, "", "x", "../x", "\ud800", "\0", "1", [], [[]], {}, {"a": {}}),
  *(
    -1,
    0,
    1,
    2,
    3,
    2**31,
    2**63,
    10**15,
    10**400,
    -(10**400),
    0.5,
    -0.0,
    1e308,
    1e-320,
  ),
  *(["x"], [0], [None], {"0": "x"}, [1] * 40, "a" * 10_000),
)
# Spelt out, for no value of Python's becomes this text.
SPELT = ("NaN", "Infinity", "-Infinity", "1e999", "[" * 5000, '{"a": 1, "a": 2}', "1 2")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("base")
  peers.save(folder, num_hidden_layers=1, num_labels=3)
  return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
  folder = tmp_path_factory.mktemp("shards")
  peers.save(folder, num_hidden_layers=1, num_labels=3, max_shard_size="2KB")
  assert (folder / INDEX).is_file()
  return folder


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
  folder = tmp_path_factory.mktemp("adapted")
  model = tuned.tiny("bert", folder / "base")
  tuned.adapt(model, folder / "adapter")
  return folder / "adapter", registry.load(folder / "base")


def read_base(folder):
  return flatten(registry.load(folder).params)


def read_adapter(folder, loaded):
  adapter, _ = hub_peft.read_adapter(folder, loaded.params, loaded.keymap)
  hub_peft.needs(folder, loaded.keymap)
  # What multiplies A B may have been changed, and nobody could tell.
  return {
    f"{path}/{name}": getattr(delta, name)
    for path, delta in adapter.items()
    for name in ("a", "b", "value")
    if hasattr(delta, name)
  }


def check(read, want, about):
  """Either what is read equals `want`, or the one error says why; soon, in memory."""
  tracemalloc.reset_peak()
  before = tracemalloc.get_traced_memory()[0]
  start = time.process_time()
  got, said = None, ""
  try:
    got = read()
  except lx.LoraxError as error:
    said = str(error)
  except BaseException as error:
    raise AssertionError(f"{about}: {error!r}") from error
  assert time.process_time() - start < SECONDS, about
  assert tracemalloc.get_traced_memory()[1] - before < BYTES, about
  assert "\n" not in said, about
  assert len(said) < 4100, about
  if got is None:
    return False
  if want is not None:
    assert got.keys() == want.keys(), about
    assert all(np.array_equal(got[key], want[key]) for key in want), about
  return True


def run(file, mutations, read, want):
  """Every mutation in the file's place; returns how many were taken."""
  whole = file.read_bytes()
  before = {path.name for path in file.parent.iterdir()}
  taken = 0
  tracemalloc.start()
  try:
    assert check(read, want, "undamaged")
    for number, damaged in enumerate(mutations):
      file.write_bytes(damaged)
      taken += check(read, want, f"{file.name}, number {number}: {damaged[:200]!r}")
  finally:
    tracemalloc.stop()
    file.write_bytes(whole)
  assert {path.name for path in file.parent.iterdir()} == before
  return taken


def damaged_bytes(whole, count, *, within, seed):
  """Flipped bits in the first `within` bytes; cuts, and bytes put in or behind."""
  rng = np.random.default_rng(seed)
  for number in range(count):
    data = bytearray(whole)
    place = int(rng.integers(within))
    match number % 4:
      case 0 | 1:
        data[place] ^= 1 << int(rng.integers(8))
      case 2:
        del data[int(rng.integers(len(data))) :]
      case 3:
        data[place:place] = rng.bytes(int(rng.integers(1, 9)))
    yield bytes(data)
  yield whole + b"\0"
  yield b""


def damaged_json(whole, count, *, seed):
  """One value of a JSON text replaced, taken out, or written twice."""
  rng = np.random.default_rng(seed)
  for number in range(count):
    value = json.loads(whole)
    places = [*_places(value)]
    holder, name = places[int(rng.integers(len(places)))]
    mark = "a mark that is replaced"
    if number % 10 == 0:
      del holder[name]
    elif number % 10 == 1 and isinstance(holder, dict):
      holder[mark] = holder[name]
      yield json.dumps(value).replace(mark, name).encode("utf-8", "surrogatepass")
      continue
    elif number % 10 == 2:
      holder[name] = mark
      text = SPELT[int(rng.integers(len(SPELT)))]
      yield json.dumps(value).replace(json.dumps(mark), text).encode()
      continue
    else:
      holder[name] = NASTY[int(rng.integers(len(NASTY)))]
    yield json.dumps(value).encode("utf-8", "surrogatepass")
  yield from (b"[]", b"null", b'"x"', b"1", b"\xff{}", b"{}", b" ", b"[" * 100_000)


def _places(value):
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for name, inner in items:
    yield value, name
    if isinstance(inner, dict | list):
      yield from _places(inner)


def header_of(file):
  whole = file.read_bytes()
  size = struct.unpack("<Q", whole[:8])[0]
  return whole[8 : 8 + size], whole[8 + size :]


def packed(header, data):
  return struct.pack("<Q", len(header)) + header + data


def test_a_base_with_a_damaged_file_of_weights(base):
  want = read_base(base)
  whole = (base / WEIGHTS).read_bytes()
  header, data = header_of(base / WEIGHTS)
  size = 8 + len(header)
  mutations = [*damaged_bytes(whole, 160, within=size, seed=0)]
  mutations += [packed(h, data) for h in damaged_json(header, 160, seed=1)]
  taken = run(base / WEIGHTS, mutations, lambda: read_base(base), want)
  assert taken < 20  # of the metadata, and of a width that JSON leaves open


def test_a_damaged_config(base):
  want = read_base(base)
  file = base / "config.json"
  whole = file.read_bytes()
  mutations = [*damaged_bytes(whole, 24, within=len(whole), seed=2)]
  mutations += damaged_json(whole, 64, seed=3)
  taken = run(file, mutations, lambda: read_base(base), want)
  assert 0 < taken < len(mutations)


def test_a_damaged_index(shards):
  want = read_base(shards)
  file = shards / INDEX
  whole = file.read_bytes()
  mutations = [*damaged_bytes(whole, 40, within=len(whole), seed=4)]
  mutations += damaged_json(whole, 100, seed=5)
  run(file, mutations, lambda: read_base(shards), want)


@pytest.mark.parametrize("file", [ADAPTER, "adapter_config.json"])
def test_a_damaged_adapter(adapted, file):
  folder, loaded = adapted
  want = read_adapter(folder, loaded)
  whole = (folder / file).read_bytes()
  if file == ADAPTER:
    header, data = header_of(folder / file)
    mutations = [*damaged_bytes(whole, 80, within=8 + len(header), seed=6)]
    mutations += [packed(h, data) for h in damaged_json(header, 80, seed=7)]
  else:
    mutations = [*damaged_bytes(whole, 60, within=len(whole), seed=8)]
    mutations += damaged_json(whole, 200, seed=9)
  run(folder / file, mutations, lambda: read_adapter(folder, loaded), want)


def test_a_damaged_tokenizer(adapted):
  folder = adapted[1].folder

  def read():
    line = [{"text": "a man a plan", "text_pair": "xyzzy"}]
    rows = tokenize(line, load_tokenizer(folder), max_length=16, token_types=True)
    return {"count": len(rows)}

  file = folder / "tokenizer.json"
  whole = file.read_bytes()
  mutations = [*damaged_bytes(whole, 60, within=len(whole), seed=10)]
  mutations += damaged_json(whole, 100, seed=11)
  run(file, mutations, read, {"count": 1})


# What each claims of the four bytes that there are.
CLAIMS = {
  "more numbers than any memory holds": [("a", "F32", [10**15], 0, 4)],
  "numbers by the product of two axes": [("a", "F32", [2**32, 2**32], 0, 4)],
  "a product that is the size again in 64 bits": [("a", "F32", [2**62 + 1], 0, 4)],
  "no number, and an axis without end": [
    ("a", "F32", [0, 2**63], 0, 0),
    ("b", "F32", [1], 0, 4),
  ],
  "more axes than an array has": [("a", "F32", [1] * 65, 0, 4)],
  "a true length": [("a", "F32", [True], 0, 4)],
  "a length that is a float": [("a", "F32", [1.0], 0, 4)],
  "a negative length twice": [("a", "F32", [-1, -1], 0, 4)],
  "the same bytes twice": [("a", "F32", [1], 0, 4), ("b", "F32", [1], 0, 4)],
  "bytes of another in part": [("a", "F16", [1], 0, 2), ("b", "F16", [1], 1, 3)],
  "a hole": [("a", "U8", [1], 0, 1), ("b", "U8", [2], 2, 4)],
  "bytes behind the end": [("a", "F32", [2], 0, 8)],
  "bytes that nobody has": [("a", "F16", [1], 0, 2)],
  "an end before the start": [("a", "F32", [0], 4, 0)],
  "a dtype that there is not": [("a", "F33", [1], 0, 4)],
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_a_header_claims_and_is_not_so(tmp_path, claim):
  header = {
    key: {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    for key, dtype, shape, start, stop in CLAIMS[claim]
  }
  (tmp_path / WEIGHTS).write_bytes(packed(json.dumps(header).encode(), b"1234"))
  tracemalloc.start()
  try:
    assert not check(lambda: dict(safetensors.open_folder(tmp_path)), None, claim)
  finally:
    tracemalloc.stop()


def test_a_key_twice_in_a_header(tmp_path):
  entry = '"a": {"dtype": "U8", "shape": [%d], "data_offsets": [%d, %d]}'
  header = f"{{{entry % (1, 0, 1)}, {entry % (3, 1, 4)}}}".encode()
  (tmp_path / WEIGHTS).write_bytes(packed(header, b"1234"))
  with pytest.raises(lx.LoraxError, match="'a' is there twice"):
    safetensors.open_folder(tmp_path)


@pytest.mark.parametrize("length", [2**63, 2**31, 33 << 20])
def test_a_header_that_claims_to_be_huge(tmp_path, length):
  with (tmp_path / WEIGHTS).open("wb") as file:
    file.write(struct.pack("<Q", length))
    file.truncate(40 << 20)  # a hole: no bytes on the disk
  tracemalloc.start()
  try:
    assert not check(lambda: safetensors.open_folder(tmp_path), None, length)
  finally:
    tracemalloc.stop()


def test_a_link_to_a_file_elsewhere_is_followed_as_the_hubs_cache_needs(base, tmp_path):
  for name in (WEIGHTS, "config.json"):
    (tmp_path / name).symlink_to(base / name)
  want, got = read_base(base), read_base(tmp_path)
  assert all(np.array_equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("target", ["/dev/zero", "loop", "."])
def test_a_link_to_what_is_no_file_is_an_error(tmp_path, target):
  (tmp_path / WEIGHTS).symlink_to(target)
  (tmp_path / "loop").symlink_to("loop")
  with pytest.raises(lx.LoraxError, match="has no model"):
    safetensors.open_folder(tmp_path)


def test_a_file_that_is_written_to_meanwhile_is_an_error(base):
  file = base / WEIGHTS
  whole = file.read_bytes()
  reader = safetensors.open_folder(base)
  key = next(iter(reader))
  try:
    file.write_bytes(whole[:-4])
    with pytest.raises(lx.LoraxError, match=f"cannot read '{key}'.*written to"):
      reader[key]
  finally:
    file.write_bytes(whole)


def test_weights_that_are_no_numbers_load_as_they_are(base):
  file = base / WEIGHTS
  whole = file.read_bytes()
  header, data = header_of(file)
  try:
    file.write_bytes(packed(header, b"\xff" * len(data)))
    assert all(np.isnan(leaf).all() for leaf in read_base(base).values())
  finally:
    file.write_bytes(whole)


def test_nothing_of_torch_is_needed_to_read_what_it_wrote(tmp_path):
  value = torch.randn(40, 50)
  from safetensors.torch import save_file

  save_file({"x": value, "y": torch.tensor(3.0)}, tmp_path / WEIGHTS)
  reader = safetensors.open_folder(tmp_path)
  part = reader.part("x", (slice(3, 17), slice(5, 44)))
  np.testing.assert_array_equal(part, value[3:17, 5:44].numpy())
  assert reader["y"] == 3

"""Files of torch.save, read without torch: against torch.load, and malicious ones."""

import collections
import os
import pickle
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from lorax_flax.errors import LoraxError
from lorax_flax.hub.files import torch_file

FLOATS = ("float64", "float32", "float16", "bfloat16")
DTYPES = (*FLOATS, "int64", "int32", "int16", "int8", "uint8", "bool")


def _numpy(tensor):
  tensor = tensor.detach()
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


def _check(path):
  """What we read is what torch reads, in its order."""
  got, want = torch_file.read(path), torch.load(path, weights_only=False)
  assert list(got) == list(want)
  for key, tensor in want.items():
    wanted = _numpy(tensor)
    assert got[key].dtype == wanted.dtype, key
    np.testing.assert_array_equal(got[key], wanted, err_msg=key)
  return got


def _save(path, value, **options):
  torch.save(value, path, **options)
  return path


@pytest.fixture
def small(tmp_path):
  """A file of two tensors; its bytes are what the fuzzers damage."""
  tensors = {"a.lora_A": torch.randn(4, 6), "a.lora_B": torch.randn(5, 4)}
  return _save(tmp_path / "small.bin", tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_reads_as_torch_reads_it(dtype, tmp_path):
  tensor = (torch.randn(3, 5) * 4).to(getattr(torch, dtype))
  _check(_save(tmp_path / "x.bin", {"x": tensor, "one": tensor[0, 0].clone()}))


def test_views_strides_and_shared_storages(tmp_path):
  whole = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
  got = _check(
    _save(
      tmp_path / "x.bin",
      {
        "whole": whole,
        "transposed": whole.permute(2, 0, 1),
        "every other": whole[:, ::2, 1:4],
        "row": whole[1],
        "expanded": whole[0, 0].expand(4, 5),
        "empty": torch.zeros(0, 7),
        "scalar": torch.tensor(3.0),
        "odd step": torch.as_strided(whole, (1, 4), (1000, 1)),
      },
    )
  )
  assert np.shares_memory(got["whole"], got["row"])
  assert not got["row"].flags.writeable


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_modules_state_dict_and_parameters(protocol, tmp_path):
  module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
  state = module.state_dict()  # with a "_metadata" attribute
  state["nested.prefix.weight"] = torch.nn.Parameter(torch.randn(2, 2))
  _check(_save(tmp_path / "x.bin", state, pickle_protocol=protocol))


@pytest.mark.parametrize("name", ["model_state_dict", "state_dict"])
def test_a_wrapped_state_dict_is_opened(name, tmp_path):
  path = _save(tmp_path / "x.pt", {name: {"a": torch.ones(2)}})
  assert list(torch_file.read(path)) == ["a"]


def test_many_tensors_beyond_the_short_memo(tmp_path):
  _check(_save(tmp_path / "x.bin", {f"t{i}": torch.tensor([i]) for i in range(300)}))


def test_a_loralib_file_reads_as_torch_reads_it(loralib_file):
  got = torch_file.read(loralib_file)
  want = torch.load(loralib_file, map_location="cpu", weights_only=True)
  assert list(got) == list(want)
  assert len(got) == 52
  for key, tensor in want.items():
    np.testing.assert_array_equal(got[key], tensor.numpy())


class _Call:
  def __init__(self, function, *args):
    self.call = (function, args)

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize(
  ("value", "named"),
  [
    (lambda flag: _Call(os.system, f"touch {flag}"), r"posix\.system"),
    (lambda flag: _Call(eval, f"open({str(flag)!r}, 'w')"), r"__builtin__\.eval"),
    (lambda flag: _Call(open, str(flag), "w"), r"io\.open"),
    (lambda flag: _Call(getattr, "x", "y"), r"__builtin__\.getattr"),
    (lambda flag: collections.Counter("aab"), r"collections\.Counter"),
    (lambda flag: np.float64(3), r"numpy\."),
    (lambda flag: torch.float32, r"torch\.float32"),
    (lambda flag: torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    (lambda flag: {1, 2}, r"__builtin__\.set"),
  ],
)
def test_what_is_no_state_dict_is_refused_by_name_and_not_run(value, named, tmp_path):
  flag = tmp_path / "ran"
  path = _save(tmp_path / "x.bin", {"a": torch.ones(2), "b": value(flag)})
  with pytest.raises(LoraxError, match=named):
    torch_file.read(path)
  assert not flag.exists()


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ([torch.ones(2)], "holds a list"),
    ({"epoch": 3, "a": torch.ones(2)}, "'epoch' is a int, not a tensor"),
    ({3: torch.ones(2)}, "key of type int"),
    ({"a": {"b": torch.ones(2)}}, "'a' is a dict"),
    ({"a": torch.ones(2).to_sparse()}, "_rebuild_sparse"),
    ({"a": torch.ones(2, dtype=torch.float8_e5m2)}, "_rebuild_tensor_v3|float8"),
  ],
)
def test_other_contents_are_one_clear_error(value, message, tmp_path):
  path = _save(tmp_path / "x.bin", value)
  with pytest.raises(LoraxError, match=message) as error:
    torch_file.read(path)
  assert str(path) in str(error.value)


def test_the_old_format_and_other_files_are_named_as_such(tmp_path):
  old = {"_use_new_zipfile_serialization": False}
  path = _save(tmp_path / "old.bin", {"a": torch.ones(2)}, **old)
  with pytest.raises(LoraxError, match=r"torch 1\.6 and later.*save it again"):
    torch_file.read(path)
  with pytest.raises(LoraxError, match="cannot read"):
    torch_file.read(tmp_path / "missing.bin")
  (tmp_path / "empty.bin").write_bytes(b"")
  with pytest.raises(LoraxError, match=r"torch 1\.6"):
    torch_file.read(tmp_path / "empty.bin")


def _repacked(source, target, change, compression=zipfile.ZIP_STORED):
  """The archive with its entries changed: name, bytes to bytes (None drops it)."""
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
    for name in old.namelist():
      data = change(name, old.read(name))
      if data is not None:
        new.writestr(name, data, compression)
  return target


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda n, d: d[:-4] if n.endswith("/0") else d, "92 bytes, not 24"),
    (lambda n, d: None if n.endswith("/0") else d, "data/0 is missing"),
    (lambda n, d: None if n.endswith("data.pkl") else d, "not one data.pkl"),
    (lambda n, d: b"big" if n.endswith("byteorder") else d, "little-endian"),
  ],
)
def test_storages_are_held_against_what_is_there(change, message, small, tmp_path):
  with pytest.raises(LoraxError, match=message):
    torch_file.read(_repacked(small, tmp_path / "y.bin", change))


def test_compressed_entries_are_refused(small, tmp_path):
  deflated = zipfile.ZIP_DEFLATED
  bomb = _repacked(small, tmp_path / "y.bin", lambda n, d: d + bytes(10**6), deflated)
  with pytest.raises(LoraxError, match="larger than the file"):
    torch_file.read(bomb)


@pytest.mark.parametrize(
  ("size", "stride", "offset", "message"),
  [
    ((5, 6), (6, 1), 0, "beyond its storage"),
    ((4, 6), (6, 1), 1, "beyond its storage"),
    ((4, 6), (7, 1), 0, "beyond its storage"),
    ((10**6, 10**6), (0, 0), 0, "larger than the file"),
    ((-4, 6), (6, 1), 0, "no proper shape"),
    ((4, 6), (-6, 1), 20, "no proper shape"),
    ((4, 6), (6,), 0, "no proper shape"),
    ((4, 6.0), (6, 1), 0, "no proper shape"),
    ((1,) * 70, (1,) * 70, 0, "no proper shape"),
  ],
)
def test_a_tensor_lies_within_its_storage(
  size, stride, offset, message, small, tmp_path
):
  class Rebuild(_Call):
    pass

  class Storage:
    pass

  class Pickler(pickle.Pickler):
    def persistent_id(self, value):
      if isinstance(value, Storage):
        return ("storage", torch.FloatStorage, "0", "cpu", 24)
      return None

  args = (Storage(), offset, size, stride, False, collections.OrderedDict())
  with (tmp_path / "data.pkl").open("wb") as file:
    Pickler(file, 2).dump({"a": Rebuild(torch._utils._rebuild_tensor_v2, *args)})
  program = (tmp_path / "data.pkl").read_bytes()
  change = lambda name, data: program if name.endswith("data.pkl") else data
  with pytest.raises(LoraxError, match=message):
    torch_file.read(_repacked(small, tmp_path / "y.bin", change))


PROGRAMS = {
  "a huge text": b"\x80\x02X\xff\xff\xff\xffabc.",
  "no end": b"\x80\x02}",
  "an empty stack": b"\x80\x02.",
  "no mark": b"\x80\x02}u.",
  "a tuple of nothing": b"\x80\x02\x87.",
  "a call of a dict": b"\x80\x02})R.",
  "a call of a class of ours": b"\x80\x02ctorch\nFloatStorage\n)R.",
  "a state for a number": b"\x80\x02K\x01}b.",
  "an unknown instruction": b"\x80\x02\xff.",
  "a list's item into a dict": b"\x80\x02}K\x01a.",
  "a persistent id of text": b"\x80\x02X\x01\x00\x00\x00aQ.",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_that_is_damaged_is_one_error(program, small, tmp_path):
  change = lambda name, data: program if name.endswith("data.pkl") else data
  path = _repacked(small, tmp_path / "y.bin", change)
  with pytest.raises(LoraxError):
    torch_file.read(path)


def test_a_huge_place_in_the_memo_takes_no_memory(small, tmp_path):
  program = b"\x80\x02}r\xff\xff\xff\xff."
  change = lambda name, data: program if name.endswith("data.pkl") else data
  path = _repacked(small, tmp_path / "y.bin", change)
  tracemalloc.start()
  assert torch_file.read(path) == {}
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**20


def test_damaged_files_end_in_one_error_or_read_as_they_were(small, tmp_path):
  whole = small.read_bytes()
  want = torch_file.read(small)
  rng = np.random.default_rng(0)
  path = tmp_path / "damaged.bin"
  errors = 0
  tracemalloc.start()
  for trial in range(600):
    damaged = bytearray(whole)
    if trial % 3 == 0:
      del damaged[rng.integers(len(whole)) :]
    else:
      for place in rng.integers(len(whole), size=rng.integers(1, 4)):
        damaged[place] ^= 1 << rng.integers(8)
    path.write_bytes(damaged)
    try:
      got = torch_file.read(path)
    except LoraxError:
      errors += 1
    else:  # the damage lay in padding or in what nobody reads
      for key, value in got.items():
        np.testing.assert_array_equal(value, want[key])
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert errors > 300
  assert peak < 4 * 2**20


def test_a_damaged_program_is_one_error_or_the_same_kind_of_dict(small, tmp_path):
  # Past the archive's checksums: the program itself is damaged.
  with zipfile.ZipFile(small) as archive:
    program = archive.read("small/data.pkl")
  rng = np.random.default_rng(1)
  for _ in range(600):
    damaged = bytearray(program)
    for place in rng.integers(len(program), size=rng.integers(1, 4)):
      damaged[place] = rng.integers(256)
    text = bytes(damaged)
    change = lambda name, data, text=text: text if name.endswith("data.pkl") else data
    path = _repacked(small, tmp_path / "y.bin", change)
    try:
      got = torch_file.read(path)
    except LoraxError:
      continue
    assert all(isinstance(value, np.ndarray) for value in got.values())

"""Reading parts of leaves, whatever the size of what is read at once."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lorax_flax import quant
from lorax_flax.adapt.paths import flatten
from lorax_flax.hub.checkpoints import load as hub_load
from lorax_flax.hub.files import safetensors
from lorax_flax.models import registry
from tests.models import peers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp("base")
  peers.save(made, num_hidden_layers=2)
  return made


@pytest.mark.parametrize("chunk", [16, 100, 1 << 20])
def test_a_part_in_any_axes_and_number_type_is_that_of_the_whole(
  tmp_path, monkeypatch, chunk
):
  monkeypatch.setattr(safetensors, "_CHUNK", chunk)
  rng = np.random.default_rng(0)
  shapes = {"a": (7, 5, 6), "b": (13, 9), "c": (50,), "d": (), "e": (0, 4)}
  tensors = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
  save_file(tensors, tmp_path / "model.safetensors")
  reader = safetensors.open_folder(tmp_path)
  for key, want in tensors.items():
    np.testing.assert_array_equal(reader[key], want)
    cuts = [[slice(None), slice(0, n // 2), slice(n // 3, n)] for n in want.shape]
    for index in itertools.product(*cuts):
      part = want[index]
      np.testing.assert_array_equal(reader.part(key, index), part)
      turned = np.empty(part.shape[::-1], ml_dtypes.bfloat16)
      reader.read(key, index, turned.T)
      np.testing.assert_array_equal(turned.T, part.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("chunk", [16, 1 << 20])
def test_equal_tensors_are_the_same_and_one_number_tells_others_apart(
  tmp_path, monkeypatch, chunk
):
  monkeypatch.setattr(safetensors, "_CHUNK", chunk)
  a = np.arange(60, dtype=np.float32).reshape(12, 5)
  other = a.copy()
  other[-1, -1] = 0
  tensors = {
    "a": a,
    "b": a.copy(),
    "c": other,
    "d": a.reshape(60),
    "e": np.array(a[0, 0]),
  }
  save_file(tensors, tmp_path / "model.safetensors")
  reader = safetensors.open_folder(tmp_path)
  assert reader.same("a", "b")
  assert reader.same("e", "e")
  assert not reader.same("a", "c")
  assert not reader.same("a", "d")


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("chunk", [32, 1 << 20])
def test_a_block_of_every_leaf_is_the_block_of_the_whole(
  folder, monkeypatch, scan, chunk
):
  monkeypatch.setattr(safetensors, "_CHUNK", chunk)
  loaded = registry.load(folder, scan=scan)
  found = hub_load.find(safetensors.open_folder(folder), loaded.keymap)
  for path, leaf in flatten(loaded.params).items():
    whole = np.asarray(leaf)
    for a, z in ((0, 0.5), (0.5, 1), (0.3, 0.8)):
      block = tuple((int(a * n), max(int(a * n) + 1, int(z * n))) for n in whole.shape)
      got = hub_load._leaf(found, path, whole.shape, None, block)
      np.testing.assert_array_equal(got, whole[tuple(slice(*ends) for ends in block)])


@pytest.mark.parametrize("scan", [False, True])
def test_shardings_and_number_types_change_no_weight(folder, scan):
  plain = registry.load(folder, scan=scan)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  placed = registry.load(
    folder,
    scan=scan,
    param_dtype="bfloat16",
    shardings=lambda axes, shapes: jax.tree.map(lambda _: one, shapes),
  )
  want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), plain.params)
  assert jax.tree.all(jax.tree.map(np.array_equal, placed.params, want))


def test_what_is_read_is_handed_over_and_not_copied():
  array = safetensors.empty((3, 5), np.dtype(np.float32))
  array[:] = 1
  placed = jax.device_put(array)
  if jax.default_backend() == "cpu":
    assert placed.unsafe_buffer_pointer() == array.ctypes.data


@pytest.mark.parametrize(
  "options",
  [
    {"scan": True},
    {"param_dtype": "bfloat16"},
    {"quant": "int8", "param_dtype": "bfloat16"},
    {"vocab_size": 41, "num_labels": 5, "new_head": True},
  ],
  ids=str,
)
def test_deferred_leaves_are_those_that_are_read_at_once(folder, options):
  want = flatten(registry.load(folder, **options).params)
  got = flatten(registry.load(folder, deferred=True, **options).params)
  assert got.keys() == want.keys()
  deferred = [leaf for leaf in got.values() if isinstance(leaf, quant.Deferred)]
  assert len(deferred) >= len(got) - 3, "a table and a head are made"
  for path, leaf in got.items():
    assert (leaf.shape, leaf.dtype) == (want[path].shape, want[path].dtype)
    one, other = (quant.realized({path: x}) for x in (leaf, want[path]))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))
    np.testing.assert_array_equal(np.asarray(leaf), quant.dense(want[path]))

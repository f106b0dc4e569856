"""Slices that are described only."""

import importlib.util
import math
from types import SimpleNamespace

import pytest

from launch.dryrun import topology as topologies
from lorax_flax.errors import LoraxError
from lorax_flax.sharding import mesh as meshes


@pytest.mark.parametrize(
  ("name", "kind", "chips"),
  [
    ("v4:2x2x4", "TPU v4", 16),
    ("v4:4x8x8", "TPU v4", 256),
    ("v5e:1x1", "TPU v5 lite", 1),
    ("v5e:2x4", "TPU v5 lite", 8),
    ("v5e:16x16", "TPU v5 lite", 256),
    ("v5p:1x1x1", "TPU v5", 1),
    ("v5p:4x8x8", "TPU v5", 256),
    ("v6e:16x16", "TPU v6 lite", 256),
  ],
)
def test_a_slice_has_one_device_a_chip_and_any_mesh(name, kind, chips):
  pytest.importorskip("libtpu")
  found = topologies.describe(name)
  assert found.size == chips == math.prod(found.shape)
  assert {d.device_kind for d in found.devices} == {kind}
  for tensor in (1, 2, chips):
    if chips % tensor == 0:
      sizes = meshes.MeshConfig(fsdp=chips // tensor, tensor=tensor)
      assert meshes.make(sizes, found.devices).shape["tensor"] == tensor


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("v5:4x4", "did you mean 'v5p' or 'v5e'"),
    ("v5e", "write it like v5e:4x4"),
    ("v5e:16", "has 2 axes, as in v5e:4x4"),
    ("v5p:4x4", "has 3 axes, as in v5p:4x4x4"),
    ("v5e:4x", "write it like"),
    ("v5e:0x4", "write it like"),
    ("v5e:32x32", "has 1024 chips, and a v5e slice at most 256"),
    ("h100:2x2x8", "hosts × GPUs of each, as in h100:2x8"),
    ("cuda:8", "unknown kind of chip 'cuda'"),
  ],
)
def test_a_slice_that_is_none_is_refused(name, said):
  with pytest.raises(LoraxError, match=said):
    topologies.parse(name)


def test_what_the_compiler_does_not_know_is_said_in_a_line():
  pytest.importorskip("libtpu")
  with pytest.raises(LoraxError, match=r"^topology 'v5e:3x5': .*not divisible.*$"):
    topologies.describe("v5e:3x5")


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(LoraxError, match=r"pip install 'lorax-flax\[tpu\]'"):
    topologies.describe("v5e:4x4")


def test_gpus_need_the_plugin_alone_which_is_named():
  if importlib.util.find_spec("jax_cuda12_plugin"):
    assert topologies.describe("h100:2x8").size == 16
  else:
    with pytest.raises(LoraxError, match="jax-cuda12-plugin jax-cuda12-pjrt"):
      topologies.describe("h100:2x8")


def _slice(kind, *shape):
  return topologies.Topology("", topologies.CHIPS[kind], shape, ())


def _line(*coords):
  return [SimpleNamespace(coords=c) for c in coords]


@pytest.mark.parametrize(
  ("where", "members", "links"),
  [
    # Open: one link each way.
    (_slice("v5e", 4, 4), [(0, i, 0) for i in range(4)], 1),
    # Closed to a ring, on a whole axis of 16 alone.
    (_slice("v5e", 16, 16), [(0, i, 0) for i in range(16)], 2),
    (_slice("v5e", 16, 16), [(0, i, 0) for i in range(8)], 1),
    (_slice("v5e", 8, 16), [(i, 0, 0) for i in range(8)], 1),
    (_slice("v5e", 8, 16), [(0, i, 0) for i in range(16)], 2),
    # Over both axes.
    (_slice("v5e", 4, 4), [(i, j, 0) for i in range(4) for j in range(4)], 2),
    # Cubes are rings every way, and what is smaller than a cube is not.
    (_slice("v5p", 4, 4, 8), [(0, 0, i) for i in range(8)], 2),
    (_slice("v5p", 2, 2, 4), [(0, 0, i) for i in range(4)], 1),
    (_slice("v4", 4, 4, 4), [(i, j, 0) for i in range(4) for j in range(4)], 4),
    (_slice("v4", 4, 4, 4), [(0, 0, 0)], 1),
  ],
)
def test_a_ring_sends_both_ways_and_a_line_one(where, members, links):
  assert where.links(_line(*members)) == links

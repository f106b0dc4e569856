"""One job on every way to cut eight virtual devices: see `mesh_worker`."""

import json
import math
import subprocess
import sys
from collections import Counter

import pytest

from lorax_flax.hub.checkpoints import keymap as km
from lorax_flax.models.bert import keys as bert_keys
from tests.sharding import mesh_worker
from tests.train import tiny

OF_TOKENS = ["windowed", "looped", "quantised", "gpt2", "encoder"]
SAME = ["plain", "scanned", "dropped", "decoder", "mixture", *OF_TOKENS]
LAYERS = {"plain": 1, "scanned": 2}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
  """What the worker found, by case and mesh."""
  folder = tmp_path_factory.mktemp("meshes")
  config = tiny.write(folder, num_hidden_layers=1)
  tiny.model(folder / "deep", tiny.BERT | {"num_hidden_layers": LAYERS["scanned"]})
  tiny.model(folder / "decoder", tiny.LLAMA)
  tiny.token_ids(folder / "decoder", tiny.LLAMA["vocab_size"])
  tiny.model(folder / "mixture", tiny.MIXTRAL)
  tiny.model(folder / "windowed", tiny.WINDOWED)
  tiny.model(folder / "gpt2", tiny.GPT2)
  done = subprocess.run(
    [
      *(sys.executable, "-m", "tests.sharding.mesh_worker"),
      *(config, folder / "deep", folder / "decoder", folder / "mixture"),
      *(folder / "windowed", folder / "gpt2"),
    ],
    cwd=tiny.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  # XLA says there what it can't cut well.
  assert "full rematerialization" not in done.stderr
  return json.loads(done.stdout)


def _of(cases, name):
  return {k: case for k, case in cases.items() if k.split()[0] == name}


@pytest.mark.parametrize("name", SAME)
def test_losses_are_the_same_on_every_mesh(cases, name):
  found = _of(cases, name)
  assert len(found) == len(mesh_worker.CASES[name][1]) > 1
  want = found[f"{name} 1×1×1"]["losses"]
  assert len({round(loss, 3) for loss, _ in want}) == mesh_worker.STEPS
  for mesh, case in found.items():
    for got, wanted in zip(case["losses"], want, strict=True):
      assert got == pytest.approx(wanted, abs=1e-5), mesh


@pytest.mark.parametrize("name", [name for name in OF_TOKENS if name != "encoder"])
def test_the_adapter_ends_the_same_where_tokens_are_sharded(cases, name):
  found = _of(cases, name)
  want = found[f"{name} 1×1×1"]["end"]
  for mesh, case in found.items():
    for got, wanted in zip(case["end"], want, strict=True):
      assert got == pytest.approx(wanted, abs=1e-5), mesh


@pytest.mark.parametrize("name", SAME)
def test_the_adapter_starts_the_same_on_every_mesh_bit_for_bit(cases, name):
  assert len({case["start"] for case in _of(cases, name).values()}) == 1


def test_the_abstract_job_lies_as_the_real_one(cases):
  found = [case["lies as described"] for case in cases.values()]
  assert [same for same in found if same is not None] == 6 * [True]


@pytest.mark.parametrize("name", ["plain", "scanned"])
def test_weights_are_read_straight_into_their_shards(cases, name):
  keymap = bert_keys.keymap("bert", LAYERS[name], scan=name == "scanned")
  for mesh, case in _of(cases, name).items():
    for key, reads in case["reads"].items():
      path, _ = km.key_to_path(keymap, key)
      layers = len(keymap.keys[path])
      assert max(reads) <= case["shards"][path] / layers, (mesh, key)
      # Devices that hold the same part share what was read.
      assert sum(reads) == math.prod(case["shapes"][path]) / layers, (mesh, key)
    assert len(case["reads"]) > 20


@pytest.mark.parametrize("mesh", ["1×8×1", "1×1×8", "2×2×2"])
def test_no_device_holds_the_whole(cases, mesh):
  case = cases[f"plain {mesh}"]
  whole = sum(math.prod(shape) for shape in case["shapes"].values())
  most = {"1×8×1": 0.15, "1×1×8": 0.3, "2×2×2": 0.3}[mesh]
  assert len(case["held"]) == 8
  assert max(case["held"]) <= most * whole


def test_the_optimisers_moments_lie_where_their_leaf_lies(cases):
  for mesh, case in _of(cases, "plain").items():
    assert Counter(case["moments"]) == Counter(2 * case["trained"]), mesh
  cut = [spec for spec in cases["plain 2×2×2"]["trained"] if "fsdp" in spec]
  assert len(cut) > 5


def _kinds(case):
  return {c["kind"] for c in case["collectives"]}


@pytest.mark.parametrize("name", ["plain", "scanned", "decoder"])
def test_under_tensor_parallelism_nothing_is_gathered(cases, name):
  assert _kinds(cases[f"{name} 1×1×8"]) == {"all-reduce"}


@pytest.mark.parametrize("name", ["plain", "scanned"])
def test_what_is_gathered_of_a_kernel_stays_cut_along_tensor(cases, name):
  whole = {math.prod(s[-2:]) for p, s in _cut_by_tensor(cases[f"{name} 2×2×2"])}
  case = cases[f"{name} 2×2×2"]
  gathered = [
    math.prod(shape)
    for c in case["collectives"]
    if c["kind"] == "all-gather" and "pooler" not in c["source"]
    for shape in c["shapes"]
  ]
  # The kernels of the layers are gathered along fsdp, the half of each.
  assert {size // 2 for size in whole} <= set(gathered)
  assert max(gathered) < max(whole)


def _cut_by_tensor(case):
  names = ("query/kernel", "intermediate/kernel", "/output/kernel")
  return [(p, s) for p, s in case["shapes"].items() if p.endswith(names)]


@pytest.mark.parametrize("mesh", ["1×1×1×4", "2×1×1×4", "1×1×2×4", "1×2×2×2"])
def test_tokens_travel_and_experts_stay(cases, mesh):
  case = cases[f"mixture {mesh}"]
  _, fsdp, tensor, ways = map(int, mesh.split("×"))
  experts = {p: s for p, s in case["shapes"].items() if "/experts/" in p}
  assert len(experts) == 2
  for path, shape in experts.items():
    assert case["shards"][path] == math.prod(shape) // (ways * fsdp * tensor)
  assert sum("'expert'" in spec for spec in case["trained"]) == 2 * len(experts)
  gathered = [
    dims
    for c in case["collectives"]
    if c["kind"] == "all-gather"
    and "/experts" in c["source"]
    and not c["source"].endswith("/all_gather")  # Those of tokens.
    for dims in c["shapes"]
    if len(dims) >= 3
  ]
  # Along fsdp, what lies on a device of its own experts.
  assert (fsdp > 1) == bool(gathered)
  assert all(dims[0] == tiny.MIXTRAL["num_local_experts"] // ways for dims in gathered)


def _reduced(case):
  """How many numbers are reduced, whatever the compiler packs together."""
  return sum(
    c["times"] * math.prod(shape)
    for c in case["collectives"]
    for shape in c["shapes"]
    if shape
  )


@pytest.mark.parametrize("name", ["plain", "scanned", "decoder"])
def test_gradients_are_reduced_of_trained_leaves_alone(cases, name):
  case = cases[f"{name} 8×1×1"]
  assert _kinds(case) == {"all-reduce"}
  assert _reduced(case) == sum(map(math.prod, case["trained_shapes"]))


def test_full_fine_tuning_reduces_every_weight(cases):
  case = cases["full 8×1×1"]
  assert _reduced(case) == sum(map(math.prod, case["shapes"].values()))


@pytest.mark.parametrize("mesh", ["1×1×1×1×4", "1×1×2×1×4", "1×2×2×1×2"])
def test_of_a_rows_tokens_keys_and_values_alone_are_gathered(cases, mesh):
  gathered = [
    (dims, c["source"])
    for c in cases[f"windowed {mesh}"]["collectives"]
    if c["kind"] == "all-gather"
    for dims in c["shapes"]
    if len(dims) > 2
  ]
  assert gathered
  for (_, tokens, heads, size), source in gathered:  # And no activations BxTxD.
    assert (tokens, size) == (16, tiny.WINDOWED["head_dim"]), source
    assert heads <= tiny.WINDOWED["num_key_value_heads"], source

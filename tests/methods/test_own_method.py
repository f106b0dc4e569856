"""A method that the package does not know, taken through all that methods go through.

W' = W + scale * (w1a @ w1b) ∘ (w2a @ w2b), LoHa's Hadamard product (arXiv 2108.06098).
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_flax as lx
from experiments import run
from experiments.cli import config_dict, config_flag
from experiments.inference import merged
from experiments.sweeps import plan, runner
from lorax_flax.adapt.paths import flatten
from lorax_flax.errors import LoraxError
from lorax_flax.hub.adapters import native
from lorax_flax.hub.peft import folder as peft
from lorax_flax.models import registry
from lorax_flax.nodes import node
from tests.adapt.checks import check_equals_merged, check_no_dense_gradient, perturbed
from tests.train import tiny

STATIC: Any = {"static": True}


@node
@dataclass(frozen=True)
class Hadamard(lx.KernelDelta):
  w1a: jax.Array
  w1b: jax.Array
  w2a: jax.Array
  w2b: jax.Array
  scale: jax.Array
  roles: tuple[str, ...] = field(metadata=STATIC)
  dropout: float = field(default=0.0, metadata=STATIC)
  layers: tuple[int, ...] | None = field(default=None, metadata=STATIC)

  axes: ClassVar = {
    **dict.fromkeys(("w1a", "w2a"), ("stack", "in", "rank")),
    **dict.fromkeys(("w1b", "w2b"), ("stack", "rank", "out")),
    "scale": ("stack",),
  }
  trained = ("w1a", "w1b", "w2a", "w2b")
  options: ClassVar = {"std": 0.5}

  @classmethod
  def start(cls, key, kernel, target, plan):
    def draw(key):
      shapes = cls.layer_shapes(target)
      keys = dict(zip(shapes, jax.random.split(key, 4), strict=True))
      std = {**dict.fromkeys(shapes, target.options["std"]), "w2b": 0.0}
      return {n: std[n] * jax.random.normal(keys[n], shapes[n]) for n in shapes}

    leaves = cls.drawn(target.key(key), target, draw)
    return cls.of(leaves, target.scale, target.roles, plan.dropout, target.layers)

  def parts(self, w):
    w1a, w1b, w2a, w2b = (self.laid_out(name, w.shape) for name in self.trained)
    scale = self.laid_out("scale", w.shape)
    return lx.Parts(_pairs(w1a, w2a), scale * _pairs(w1b, w2b))


def _pairs(x, y):
  """Every product of a column of one with a column of the other, (…, r²)."""
  return (x[..., :, None] * y[..., None, :]).reshape(*x.shape[:-1], -1)


lx.METHODS["hadamard"] = Hadamard

LAYERS, WIDTH = 3, 6
CONFIG = lx.LoraConfig(targets="kernel", rank=2, alpha=3.0, method="hadamard")
X = jax.random.normal(jax.random.key(1), (4, WIDTH))
KERNELS = jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH))


def scanned(params, x):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["kernel"])[0]


def looped(params, x):
  for i in range(LAYERS):
    x = jnp.tanh(x @ params["kernel"][i])
  return x


def single(params, x):
  return x @ params["kernel"]


CASES = {
  "single": (single, {"kernel": KERNELS[0]}, {}),
  "looped": (looped, {"kernel": KERNELS}, {"stack_axes": {"kernel": (0,)}}),
  "scanned": (scanned, {"kernel": KERNELS}, {}),
  "some layers": (scanned, {"kernel": KERNELS}, {"layers": (0, 2)}),
  "own ranks": (scanned, {"kernel": KERNELS}, {"rank_pattern": {"kernel": (1, 0, 3)}}),
}


def start(case, **changes):
  fn, params, fields = CASES[case]
  config = dataclasses.replace(CONFIG, **fields, **changes)
  lora = lx.adapt(fn, config)
  return lora, fn, params, lora.init(jax.random.key(2), params, X)


@pytest.mark.parametrize("case", CASES)
def test_it_is_followed_merged_and_unmerged_like_any_other(case):
  lora, fn, params, adapter = start(case)
  np.testing.assert_allclose(lora.apply(params, adapter, X), fn(params, X), atol=1e-6)
  assert lora.plan(params, X).targets[0].size == sum(
    int((np.asarray(x) != 0).sum()) if "own" in case else x.size
    for x in _trained(_filled(adapter))
  )
  moved = perturbed(adapter)
  if case != "own ranks":
    check_equals_merged(lora, fn, params, moved, X)
  check_no_dense_gradient(lora, params, moved, X)
  back = lx.unmerge(lx.merge(params, moved), moved)
  np.testing.assert_allclose(back["kernel"], params["kernel"], atol=1e-5)


def _filled(adapter):
  """The adapter with the leaf that starts as zeros filled where its pair is."""
  delta = adapter["kernel"]
  used = jnp.swapaxes(jnp.any(delta.w2a != 0, -2, keepdims=True), -1, -2)
  filled = delta.w2b + used.astype(jnp.float32)
  return {"kernel": dataclasses.replace(delta, w2b=filled)}


def _trained(adapter):
  return jax.tree.leaves(lx.partition(adapter, lx.trainable_mask(adapter))[0])


def test_it_is_the_product_of_two_low_rank_products():
  _, _, params, adapter = start("single")
  delta = perturbed(adapter)["kernel"]
  want = 1.5 * (delta.w1a @ delta.w1b) * (delta.w2a @ delta.w2b)
  got = lx.merge(params, {"kernel": delta})["kernel"] - params["kernel"]
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_vmap_over_adapters_and_scales():
  lora, _, params, adapter = start("scanned")
  several = [perturbed(adapter, seed) for seed in range(3)]
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *several)
  got = jax.vmap(lambda a: lora.apply(params, a, X))(stacked)
  for one, each in zip(got, several, strict=True):
    np.testing.assert_allclose(one, lora.apply(params, each, X), atol=1e-5)


def test_its_options_and_its_declaration_are_checked():
  _, _, _, adapter = start("single", options={"std": 0.0})
  assert not np.any(adapter["kernel"].w1a)
  with pytest.raises(LoraxError, match=r"unknown option of hadamard 'sdt'.*'std'"):
    start("single", options={"sdt": 0.0})
  with pytest.raises(LoraxError, match=r"unknown LoraConfig\.method 'hadamrd'.*'hadam"):
    lx.LoraConfig(method="hadamrd")

  @node
  @dataclass(frozen=True)
  class Undeclared(Hadamard):
    more: jax.Array = field(kw_only=True)

  with pytest.raises(LoraxError, match="differs in more"):
    lx.METHODS["undeclared"] = Undeclared

  @jax.tree_util.register_dataclass
  @dataclass(frozen=True)
  class OfJax(Hadamard):
    pass

  with pytest.raises(LoraxError, match=r"OfJax must be .* below @lx\.node"):
    lx.METHODS["of_jax"] = OfJax
  with pytest.raises(LoraxError, match="subclass of KernelDelta"):
    lx.METHODS["lambda"] = lambda: None


def test_peft_has_no_form_for_it_and_ours_has(tmp_path):
  _, _, params, adapter = start("some layers")
  moved = perturbed(adapter)
  native.write_adapter(tmp_path / "ours", native.Saved(moved, CONFIG))
  found = native.read_adapter(tmp_path / "ours", params)
  assert found.config == CONFIG
  jax.tree.map(np.testing.assert_array_equal, found.adapter, moved)
  with pytest.raises(LoraxError, match=r"'w1a' of shape .* beside the base's"):
    native.read_adapter(tmp_path / "ours", {"kernel": KERNELS[:, :4]})


_OWN = """
from experiments.configs import common
import lorax_flax as lx
from tests.methods.test_own_method import Hadamard

lx.METHODS["hadamard"] = Hadamard
"""
_SWEEP = """

def sweep(add):
  for rank in (1, 3):
    add(**{"lora.rank": rank, "lora.alpha": 2.0 * rank})
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """A user's config, which registers the method."""
  file = tiny.write(tmp_path_factory.mktemp("own"), num_hidden_layers=1)
  text = file.read_text().replace("from experiments.configs import common\n", _OWN)
  text = text.replace(
    "  return config", '  config.lora.method = "hadamard"\n  return config'
  )
  file.write_text(text + _SWEEP)
  return file


def _settings(config):
  return config_dict.convert(config_flag.load(str(config)))


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
  folder = tmp_path_factory.mktemp("trained")
  return folder, run.run(_settings(config), folder)


def _exported(folder, config):
  """The merged model of a run, by path."""
  base = str(config.parent / "model")
  found = merged.load(base, str(folder / "adapter"))
  return flatten(found.loaded.params)


def test_a_run_trains_it_and_its_adapter_is_merged(config, trained, tmp_path):
  folder, result = trained
  assert native.is_ours(folder / "adapter")
  about = json.loads((folder / "adapter" / native.FILE).read_text())
  methods = {each["method"] for each in about["deltas"].values()}
  assert methods == {"hadamard", "full"}
  assert result["trained_parameters"] > 0
  loaded = registry.load(config.parent / "model", num_labels=2, new_head=True)
  found = native.read_adapter(folder / "adapter", loaded.params)
  with pytest.raises(LoraxError, match="PEFT has no form for Hadamard"):
    peft.write_adapter(tmp_path, found.adapter, loaded.keymap, found.config)
  path = "encoder/layer_0/attention/query/kernel"
  base = flatten(loaded.params)
  moved = _exported(folder, config)
  assert np.abs(moved[path] - base[path]).max() > 1e-3


def test_trials_of_other_ranks_train_together_as_alone(config, tmp_path):
  planned = plan.of(config_flag.choose(str(config)))
  padded, _ = planned.listed()
  assert runner.train(planned, tmp_path / "swept", [0, 1]) == 0
  run.run(padded.settings, tmp_path / "alone")
  swept = tmp_path / "swept" / padded.name
  _check_same(swept, tmp_path / "alone", config, 1e-4)


_RUN = """
import dataclasses, json, sys
from pathlib import Path
from experiments import run
from experiments.cli import config_dict, config_flag
from lorax_flax.sharding.mesh import MeshConfig

config, folder, mesh = sys.argv[1:]
found = config_dict.convert(config_flag.load(config))
found = dataclasses.replace(found, mesh=MeshConfig(**json.loads(mesh)))
run.run(found, Path(folder))
"""


def _process(config, folder, **mesh):
  """A run in a process of its own, on as many devices as the mesh has."""
  devices = int(np.prod([*mesh.values()], initial=1))
  return subprocess.Popen(
    [sys.executable, "-c", _RUN, str(config), str(folder), json.dumps(mesh)],
    cwd=tiny.ROOT,
    env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)},
  )


def test_a_mesh_of_eight_devices_makes_no_difference(config, trained, tmp_path):
  assert _process(config, tmp_path, data=2, fsdp=2, tensor=2).wait() == 0
  _check_same(tmp_path, trained[0], config, 2e-3)


def test_a_killed_run_is_resumed(config, trained, tmp_path):
  process = _process(config, tmp_path)
  deadline = time.monotonic() + 300
  while not _checkpoint(tmp_path) and process.poll() is None:
    assert time.monotonic() < deadline
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (tmp_path / "result.json").exists()
  run.run(_settings(config), tmp_path)
  _check_same(tmp_path, trained[0], config, 1e-5)


def _checkpoint(folder: Path) -> bool:
  return any(entry.name.isdecimal() for entry in folder.glob("checkpoints/*"))


def _check_same(folder, other, config, tolerance):
  got, want = _exported(folder, config), _exported(other, config)
  for path, leaf in want.items():
    np.testing.assert_allclose(got[path], leaf, atol=tolerance, err_msg=path)

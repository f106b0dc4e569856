"""A sharded base with an adapter merged in, on eight virtual devices."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lorax_flax as lx
from lorax_flax.adapt.merge import deferred
from lorax_flax.adapt.paths import flatten
from lorax_flax.hub.checkpoints import export
from lorax_flax.models import registry
from lorax_flax.sharding import mesh as meshes
from tests.train import tiny


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """What `main` prints in a process of eight devices."""
  folder = tmp_path_factory.mktemp("merging")
  tiny.model(folder / "base", tiny.LLAMA | {"num_hidden_layers": 6})
  done = subprocess.run(
    [sys.executable, "-m", "tests.sharding.test_merging", folder],
    cwd=tiny.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return folder, json.loads(done.stdout)


def test_each_leaf_keeps_its_sharding(found):
  _, about = found
  assert about["sharded"] > 20
  assert about["moved"] == []


def test_one_leaf_is_gathered_at_a_time(found):
  folder, about = found
  assert about["held"] < 3 * about["largest"] < about["total"] / 3
  got, want = (load_file(folder / f"{n}/model.safetensors") for n in ("mesh", "one"))
  assert got.keys() == want.keys()
  for key, value in got.items():
    np.testing.assert_allclose(value, want[key], rtol=1e-6, atol=1e-6)


def main() -> None:
  jax.config.update("jax_num_cpu_devices", 8)
  folder = Path(sys.argv[1])
  mesh = meshes.make(meshes.MeshConfig(fsdp=4, tensor=2))
  shardings = lambda axes, shapes: meshes.of_params(
    mesh, meshes.names_by_path(axes), shapes
  )
  loaded = registry.load(folder / "base", shardings=shardings)
  tokens = jnp.zeros((1, 4), jnp.int32)
  lora = lx.adapt(
    lambda params, x: loaded.module.apply({"params": params}, x, jnp.ones_like(x)),
    lx.LoraConfig(rank=2, targets="all-linear"),
  )
  adapter = lora.init(jax.random.key(0), loaded.params, tokens)
  adapter = jax.tree.map(lambda x: x + 0.1, adapter)
  before, merged = flatten(loaded.params), flatten(lx.merge(loaded.params, adapter))
  about = {
    "sharded": sum(not x.is_fully_replicated for x in merged.values()),
    "moved": [
      path
      for path, leaf in merged.items()
      if not leaf.sharding.is_equivalent_to(before[path].sharding, leaf.ndim)
    ],
    "largest": max(x.nbytes for x in before.values()),
    "total": sum(x.nbytes for x in before.values()),
  }
  del merged, before
  held, check = [], export.check_finite

  def noted(key, value):
    held.append(_live())
    check(key, value)

  start, export.check_finite = _live(), noted
  _write(folder / "mesh", loaded, adapter)
  about["held"] = max(held) - start
  export.check_finite = check
  _write(folder / "one", registry.load(folder / "base"), jax.device_get(adapter))
  print(json.dumps(about))


def _live() -> int:
  return sum(x.nbytes for x in jax.live_arrays())


def _write(folder: Path, loaded: registry.Loaded, adapter: lx.Adapter) -> None:
  export.write_checkpoint(
    folder,
    deferred(loaded.params, adapter),
    loaded.keymap,
    loaded.hf_config,
    architecture=loaded.family.architecture,
    labels=None,
    base=loaded.folder,
    overwrite=False,
  )


if __name__ == "__main__":
  main()

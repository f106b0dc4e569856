"""LoRA's dropout inside shard_map, on four devices, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
import lorax_flax as lx
from tests.adapt.checks import perturbed

params, x = {"w": jnp.ones((6, 5))}, jnp.ones((8, 6))
config, key = lx.LoraConfig(rank=2, targets=["w"], dropout=0.5), jax.random.key(3)
adapter = perturbed(lx.adapt(lambda p, x: x @ p["w"], config).init(key, params, x))

def run(fn):
  return np.asarray(lx.adapt(fn, config).apply(params, adapter, x, dropout_key=key))

unsharded = run(lambda p, x: x @ p["w"])
for check in (True, False):
  def sharded(shape, x_spec):
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    fn = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(x_spec, P()),
                       out_specs=x_spec, check_vma=check)
    return run(lambda p, x: fn(x, p["w"]))

  rows = sharded((2, 2), P(("a", "b"))).reshape(4, 2, 5)
  for i in range(4):
    for j in range(i):
      assert not np.allclose(rows[i], rows[j]), (check, i, j, "the same places")
  two = sharded((2, 2), P("a")).reshape(2, 4, 5)
  assert not np.allclose(*two), check
  np.testing.assert_allclose(sharded((2, 2), P()), unsharded, rtol=1e-5)
  np.testing.assert_allclose(sharded((1, 1), P("a")), unsharded, rtol=1e-5)
print("passed")
"""


def test_shards_drop_their_own_places_and_replicated_values_the_same():
  root = Path(__file__).resolve().parents[2]
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    cwd=root,
    env=os.environ | {"PYTHONPATH": str(root), "JAX_NUM_CPU_DEVICES": "4"},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.stdout == "passed\n", done.stderr

"""The first steps of one job on many meshes of eight virtual devices.

`python -m tests.train.mesh_worker CONFIG DEEP DECODER` prints JSON: for each case what
`test_meshes.py` looks at. DEEP is a model of several layers, for the cases that scan
them, and DECODER one that predicts tokens. All in one process, since starting one takes
longer than a case does.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

import lorax_flax as lx
from benchmarks import hlo
from experiments import configuration, job, settings
from lorax_flax.adapt.paths import flatten
from lorax_flax.data import sequences
from lorax_flax.hub.safetensors import Reader
from lorax_flax.models import registry
from lorax_flax.train import losses, optim
from lorax_flax.train import mesh as meshes
from lorax_flax.train import state as states
from lorax_flax.train import step as steps
from lorax_flax.train.loop import Job

PLAIN = {"model.dropout": 0.0, "model.head_dropout": 0.0, "lora.dropout": 0.0}
SCANNED = PLAIN | {"model.scan": True}
DROPPED = {"lora.targets": "query,value"}
FULL = PLAIN | {"lora.targets": (), "lora.tuned": ".*"}
DECODER: dict[str, Any] = {"decoder": True}
# data, fsdp, tensor: every way to cut eight devices, and what is on fewer.
MESHES = (
  *((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)),
  *((4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (1, 2, 2)),
  *((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)),
)
CASES = {
  "plain": (PLAIN, MESHES),
  "scanned": (SCANNED, ((1, 1, 1), (8, 1, 1), (1, 1, 8), (2, 2, 2))),
  "dropped": (DROPPED, ((1, 1, 1), (2, 2, 2))),
  "full": (FULL, ((8, 1, 1),)),
  "decoder": (DECODER, tuple(m for m in MESHES if max(m) != 4 and m != (2, 1, 2))),
}
STEPS = 3


def prepare(spec: str, changes: dict[str, Any], sizes: tuple[int, int, int]) -> Job:
  config = configuration.load(spec)
  values = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), sizes, strict=True))
  with config.unlocked():
    for name, value in (changes | values).items():
      section, _, field = name.partition(".")
      config[section][field] = value
  wanted = settings.convert(config)
  job._mesh = lambda wanted, say: meshes.make(
    wanted.mesh, jax.devices()[: int(np.prod(sizes))]
  )
  return job.prepare(wanted, lambda line: None)


def prepare_decoder(folder: str, sizes: tuple[int, int, int]) -> SimpleNamespace:
  """Token ids, each of which is to follow from those before it."""
  mesh = meshes.make(meshes.MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
  loaded = registry.load(folder, shardings=functools.partial(job._shardings, mesh, id))
  lora = lx.adapt(
    lambda params, batch: loaded.module.apply({"params": params}, **batch),
    lx.LoraConfig(rank=2, targets="all-linear"),
  )
  rng = np.random.default_rng(0)
  ids_BxT = rng.integers(0, loaded.config.vocab_size, (8, 8)).astype(np.int32)
  mask_BxT = (np.arange(8)[None, :] < rng.integers(3, 9, 8)[:, None]).astype(np.int32)
  labels_BxT = np.where(mask_BxT, ids_BxT, sequences.IGNORED)
  weights_B = np.asarray(losses.targets(labels_BxT))
  inputs = {"input_ids": ids_BxT, "attention_mask": mask_BxT}
  return SimpleNamespace(
    mesh=mesh,
    params=loaded.params,
    axes=meshes.names_by_path(loaded.family.logical_axes(loaded.module)),
    adapter=lora.init(jax.random.key(0), loaded.params, inputs),
    forward=lambda params, adapter, batch, key: lora.apply(params, adapter, batch),
    loss=losses.next_token(),
    batches=iter(STEPS * [inputs | {"labels": labels_BxT, "weights": weights_B}]),
  )


@contextmanager
def watched() -> Iterator[dict[str, list[int]]]:
  """Sizes of what is read of each stored tensor."""
  reads: dict[str, list[int]] = {}
  read = Reader.read

  def noted(self, key, index, out):
    reads.setdefault(key, []).append(out.size)
    read(self, key, index, out)

  Reader.read = noted
  try:
    yield reads
  finally:
    Reader.read = read


def run(spec: str, changes: dict[str, Any], sizes: tuple[int, int, int]) -> dict:
  made: Any
  with watched() as reads:
    if changes is DECODER:
      made = prepare_decoder(spec, sizes)
    else:
      made = prepare(spec, changes, sizes)
  rate = lambda step: np.float32(0.02)
  optimizer = optim.adamw(
    rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, grad_clip=1.0
  )
  lies = meshes.of_adapter(made.mesh, made.axes, made.adapter)
  adapter = meshes.place(made.adapter, lies)
  state, base = states.create(made.params, adapter, optimizer, jax.random.key(1))
  shardings = states.shardings(state, optimizer, lies, made.mesh)
  state = meshes.place(state, shardings)
  start = hashlib.sha256()
  for path, leaf in sorted(flatten(state.trained).items()):
    start.update(path.encode() + np.asarray(leaf).tobytes())
  step = steps.train_step(
    made.forward, made.loss, optimizer, rate, 1, shardings, "stop"
  )
  rows = meshes.batch(made.mesh)
  found, compiled = [], None
  for _ in range(STEPS):
    batch = {n: meshes.place(x, rows) for n, x in next(made.batches).items()}
    if compiled is None:
      with jax.set_mesh(made.mesh):
        compiled = step.lower(state, base, batch).compile()
    state, metrics = compiled(state, base, batch)
    found.append([metrics["loss"].value(), metrics["grad_norm"].value()])
  leaves = flatten(made.params)
  return {
    "losses": found,
    "start": start.hexdigest(),
    "reads": reads,
    "shards": {p: leaf.addressable_shards[0].data.size for p, leaf in leaves.items()},
    "shapes": {path: leaf.shape for path, leaf in leaves.items()},
    "held": [
      sum(leaf.addressable_shards[i].data.size for leaf in leaves.values())
      for i in range(made.mesh.size)
    ],
    "moments": [
      str(x.sharding.spec) for x in jax.tree.leaves(state.opt_state) if x.ndim
    ],
    "trained": [str(x.sharding.spec) for x in jax.tree.leaves(state.trained)],
    "trained_shapes": [x.shape for x in jax.tree.leaves(state.trained)],
    "collectives": [
      {"kind": c.kind, "shapes": [dims for _, dims in c.shapes], "times": c.times}
      | {"source": c.source}
      for c in hlo.collectives(compiled.as_text())
    ],
  }


def main() -> None:
  jax.config.update("jax_num_cpu_devices", 8)
  config, deep, decoder = sys.argv[1:]
  SCANNED["model.path"] = deep
  found = {
    f"{name} {'×'.join(map(str, sizes))}": run(
      decoder if changes is DECODER else config, changes, sizes
    )
    for name, (changes, all_sizes) in CASES.items()
    for sizes in all_sizes
  }
  print(json.dumps(found))


if __name__ == "__main__":
  main()

"""The first steps of one job on many meshes of eight virtual devices.

`python -m tests.sharding.mesh_worker CONFIG DEEP DECODER MIXTURE WINDOWED GPT2` prints
JSON: for each case what `test_meshes.py` looks at. DEEP is a model of several layers,
for the cases that scan them; the others predict tokens. All in one process, since
starting one takes longer than a case does.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from experiments import run as experiments_run
from experiments.cli import config_dict, config_flag
from launch.dryrun import hlo
from lorax_flax.adapt.paths import flatten
from lorax_flax.hub.files.safetensors import Reader
from lorax_flax.jobs import abstract, settings
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train import loop, token_scores
from lorax_flax.train.config import durations
from lorax_flax.train.loop import Job

PLAIN = {"model.dropout": 0.0, "model.head_dropout": 0.0, "lora.dropout": 0.0}
SCANNED = PLAIN | {"model.scan": True}
DROPPED = {"lora.targets": "query,value"}
FULL = PLAIN | {"lora.targets": (), "lora.tuned": ".*"}
# Trained on the folder's token ids.
DECODER = {
  "model.path": "DECODER",
  "data.task": "next_token",
  "data.path": "DECODER",
  "data.glue_dir": None,
  "lora.tuned": (),
  "lora.dropout": 0.0,
}
# Rows of several texts each, whose tokens are sharded.
PACKED = DECODER | {"data.max_length": 16, "data.packing": True}
PACKED |= {"lora.targets": "all-linear", "train.learning_rate": 0.005}
WINDOWED = PACKED | {
  "model.path": "WINDOWED",
  "model.scan": True,
  "model.remat": "full",
}
LOOPED = WINDOWED | {"model.scan": False, "model.remat": "none"}
QUANTISED = WINDOWED | {"model.quant": "int8"}
GPT2 = PACKED | {"model.path": "GPT2", "model.dropout": 0.1}
MIXTURE = DECODER | {"model.path": "MIXTURE", "lora.targets": "all-linear"}
AXES = ("data", "fsdp", "tensor", "expert", "sequence")
# data, fsdp, tensor: each alone, all, and each pair, which are on fewer than there are.
# A way of 2 or 4 shards what one of 8 does.
MESHES = (
  *((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)),
  *((2, 2, 1), (2, 1, 2), (1, 2, 2)),
)
# And expert.
OF_EXPERTS = (
  *((1, 1, 1), (2, 2, 2), (1, 1, 1, 4)),
  *((2, 1, 1, 4), (1, 2, 1, 4), (1, 1, 2, 4), (1, 2, 2, 2)),
)
# And sequence.
OF_TOKENS = (
  *((1, 1, 1), (1, 1, 1, 1, 2), (1, 1, 1, 1, 4), (1, 1, 1, 1, 8)),
  *((1, 1, 2, 1, 4), (1, 2, 2, 1, 2)),
)
CASES = {
  "plain": (PLAIN, MESHES),
  "scanned": (SCANNED, ((1, 1, 1), (8, 1, 1), (1, 1, 8), (2, 2, 2))),
  "dropped": (DROPPED, ((1, 1, 1), (2, 2, 2))),
  "full": (FULL, ((8, 1, 1),)),
  "mixture": (MIXTURE, OF_EXPERTS),
  "decoder": (DECODER, MESHES[:5]),
  "windowed": (WINDOWED, OF_TOKENS),
  "looped": (LOOPED, ((1, 1, 1), (1, 1, 2, 1, 2))),
  "quantised": (QUANTISED, ((1, 1, 1), (1, 2, 1, 1, 2))),
  "gpt2": (GPT2, ((1, 1, 1), (1, 1, 2, 1, 4))),
  "encoder": (PLAIN, ((1, 1, 1), (1, 1, 2, 1, 4))),
}
STEPS = 3


def prepare(
  spec: str, changes: dict[str, Any], sizes: tuple[int, ...]
) -> tuple[settings.Settings, Job]:
  config = config_flag.load(spec)
  values: dict[str, Any] = {
    f"mesh.{name}": n for name, n in zip(AXES, sizes, strict=False)
  }
  values |= {"train.schedule": "constant", "train.weight_decay": 0.01}
  with config.unlocked():
    for name, value in (changes | values).items():
      section, _, field = name.partition(".")
      config[section][field] = value
  wanted = config_dict.convert(config)
  devices = jax.devices()[: math.prod(sizes)]
  with mock.patch.object(jax, "devices", return_value=devices):
    return wanted, experiments_run.prepare({Path(): wanted})


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


def run(spec: str, changes: dict[str, Any], sizes: tuple[int, ...]) -> dict:
  # Losses of a few tokens at a time: rows of 16 are several chunks on few devices.
  with mock.patch.object(token_scores, "room_of", return_value=512):
    return _run(spec, changes, sizes)


def _run(spec: str, changes: dict[str, Any], sizes: tuple[int, ...]) -> dict:
  with watched() as reads:
    wanted, made = prepare(spec, changes, sizes)
  mesh, data = made.model.mesh, made.data
  plan = durations(wanted.train, data.steps_per_epoch)
  program = loop.program_of(made, plan)
  state, base = program.start()
  start = hashlib.sha256()
  for path, leaf in sorted(flatten(state.trained).items()):
    start.update(path.encode() + np.asarray(leaf).tobytes())
  rows = meshes.batch(mesh)
  found, compiled, same = [], None, None
  for _ in range(STEPS):
    batch = {n: meshes.place(x, rows) for n, x in next(data.batches).items()}
    if compiled is None:
      if sizes.count(2) == 3 and not changes.get("data.packing"):
        shapes = abstract.abstract(wanted, mesh)
        same = _same((state, base, batch), (shapes.state, shapes.base, shapes.batch))
      with jax.set_mesh(mesh):
        compiled = program.step.lower(state, base, batch).compile()
    state, metrics = compiled(state, base, batch)
    found.append([metrics["loss"].value(), metrics["grad_norm"].value()])
  leaves = flatten(made.model.params)
  # What is trained in full has left the base.
  placed = {path: x for path, x in leaves.items() if not isinstance(x, np.ndarray)}
  return {
    "losses": found,
    "lies as described": same,
    "start": start.hexdigest(),
    "end": [x.ravel().tolist() for x in jax.device_get(jax.tree.leaves(state.trained))]
    if changes.get("data.packing")
    else None,
    "reads": reads,
    "shards": {
      path: sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(leaf))
      for path, leaf in placed.items()
    },
    "shapes": {path: leaf.shape for path, leaf in leaves.items()},
    "held": [
      sum(leaf.addressable_shards[i].data.size for leaf in jax.tree.leaves(placed))
      for i in range(mesh.size)
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


def _same(arrays: Any, shapes: Any) -> bool:
  """Whether arrays lie as their ShapeDtypeStructs say."""
  told = lambda x: (x.shape, str(x.dtype), str(x.sharding.spec))
  return jax.tree.map(told, arrays) == jax.tree.map(told, shapes)


def main() -> None:
  jax.config.update("jax_num_cpu_devices", 8)
  config, deep, decoder, MIXTURE["model.path"], windowed, gpt2 = sys.argv[1:]
  SCANNED["model.path"] = deep
  DECODER["model.path"] = DECODER["data.path"] = decoder
  MIXTURE["data.path"] = decoder
  for case in (WINDOWED, LOOPED, QUANTISED):
    case |= {"model.path": windowed, "data.path": decoder}
  GPT2.update({"model.path": gpt2, "data.path": decoder})
  found = {
    f"{name} {'×'.join(map(str, sizes))}": run(config, changes, sizes)
    for name, (changes, all_sizes) in CASES.items()
    for sizes in all_sizes
  }
  print(json.dumps(found))


if __name__ == "__main__":
  main()

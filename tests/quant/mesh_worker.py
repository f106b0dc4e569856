"""Logits of a quantised model on meshes of eight virtual devices, as JSON."""

import functools
import json
import sys

import jax
import numpy as np

import lorax_flax as lx
from lorax_flax.adapt.paths import flatten
from lorax_flax.jobs import build
from lorax_flax.models import registry
from lorax_flax.sharding import mesh as meshes
from lorax_flax.sharding.mesh import MeshConfig
from tests.models import family

KERNEL = "model/layer_0/self_attn/q_proj/kernel"


def load(folder, name, **sizes):
  mesh = meshes.make(MeshConfig(**sizes), jax.devices()[: np.prod([*sizes.values()])])
  shardings = functools.partial(build._shardings, mesh)
  return registry.load(folder, quant=name, shardings=shardings)


def main(folder: str) -> None:
  ids, mask = family.tokens(9, 8, 40)
  inputs = {"input_ids": ids, "attention_mask": mask}
  logits = []
  for sizes in ({"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}):
    loaded = load(folder, "int8", **sizes)
    apply = lambda params, x, m=loaded.module: m.apply({"params": params}, **x)
    adapted = lx.adapt(apply, lx.LoraConfig(targets="all-linear", rank=2))
    adapter = adapted.init(jax.random.key(0), loaded.params, inputs)
    logits.append(np.asarray(jax.jit(adapted.apply)(loaded.params, adapter, inputs)))
    if len(sizes) == 3:
      codes = flatten(loaded.params)[KERNEL].codes.sharding.spec
  try:
    load(folder, "nf4", fsdp=4)
    error = ""
  except lx.LoraxError as e:
    error = str(e)
  found = [x.tolist() for x in logits]
  print(json.dumps({"logits": found, "codes": list(codes), "error": error}))


if __name__ == "__main__":
  main(sys.argv[1])

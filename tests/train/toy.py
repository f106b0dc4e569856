"""A tiny run of the real loop: bags of embedded tokens, tuned and low-rank leaves.

As a program (`python -m tests.train.toy WORKDIR`) it is what the tests kill.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lorax_flax as lx
from lorax_flax.data import pipeline
from lorax_flax.data.tokens import Tokens, ragged
from lorax_flax.files import bucket, workdir
from lorax_flax.sharding import mesh
from lorax_flax.train import loop, losses
from lorax_flax.train.config import TrainConfig
from lorax_flax.train.logs.history import Diverged
from lorax_flax.train.logs.page import About
from lorax_flax.train.loop import Data, Job
from lorax_flax.train.objective import TOKENS, Objective
from lorax_flax.train.step import Model
from lorax_flax.train.trials import Run

VOCAB, WIDTH = 50, 8
AXES = {
  "embed": ("vocab", "embed"),
  "dense/kernel": ("embed", "mlp"),
  "head/kernel": ("mlp", "labels"),
}
CONFIG = TrainConfig(
  epochs=3,
  batch_size=8,
  eval_batch_size=16,
  learning_rate=0.1,
  warmup_fraction=0.1,
  weight_decay=0.01,
  accumulation=2,
  label_smoothing=0.1,
  log_steps=7,
  save_steps=5,
)


def tokens(count: int, seed: int) -> Tokens:
  """Rows whose class is whether small ids are in the majority."""
  rng = np.random.default_rng(seed)
  rows = [rng.integers(1, VOCAB, rng.integers(3, 20)) for _ in range(count)]
  labels = np.array([np.mean(row) < VOCAB / 2 for row in rows], np.int32)
  values, offsets = ragged(rows)
  return Tokens(values, offsets, pad_id=0, labels_N=labels)


def apply_fn(params, batch, dropout_key=None):
  x = params["embed"][batch["input_ids"]]
  if dropout_key is not None:
    x = jnp.where(jax.random.bernoulli(dropout_key, 0.9, x.shape), x / 0.9, 0.0)
  mask = batch["attention_mask"].astype(jnp.float32)[..., None]
  x = (x * mask).sum(1) / mask.sum(1)
  return jnp.tanh(x @ params["dense"]["kernel"]) @ params["head"]["kernel"]


def params():
  rng = np.random.default_rng(7)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    "embed": draw(VOCAB, WIDTH),
    "dense": {"kernel": draw(WIDTH, WIDTH)},
    "head": {"kernel": draw(WIDTH, 2) * 0.1},
  }


def job(
  folder: Path = Path(),
  config: TrainConfig = CONFIG,
  rank: int = 2,
  name: str = "",
  buckets: tuple[int, ...] = (24,),
) -> Job:
  train, held_out = tokens(60, 1), tokens(37, 2)
  shape = pipeline.Shape(config.batch_size, buckets)
  lora = lx.adapt(
    apply_fn,
    lx.LoraConfig(
      targets=["dense/kernel"], rank=rank, tuned=["head/kernel"], dropout=0.1
    ),
  )
  base = params()

  def forward(params, adapter, batch, key):
    keys = (None, None) if key is None else jax.random.split(key)
    return lora.apply(params, adapter, batch, keys[0], lora_dropout_key=keys[1])

  example = {k: v for k, v in train.batch(np.arange(4), 24).items() if v.ndim == 2}
  adapter = lora.init(jax.random.key(config.seed), base, example)
  loss = losses.cross_entropy(config.label_smoothing)
  eval_shape = pipeline.Shape(config.eval_batch_size, (24,))
  return Job(
    runs=[Run(config, adapter, folder, export, About("toy"), name)],
    model=Model(forward, base, AXES, mesh.make(mesh.MeshConfig(), jax.devices()[:1])),
    objective=Objective(
      loss,
      ("accuracy", "f1"),
      "accuracy",
      throughput=TOKENS,
    ),
    data=Data(
      pipeline.training(train, shape, seed=config.seed),
      pipeline.steps_per_epoch(60, config.batch_size),
      {"validation": pipeline.evaluation(held_out, eval_shape)},
    ),
  )


def with_batches(job: Job, change) -> Job:
  """The job with `change(batches)` in the place of its batches."""
  data = dataclasses.replace(job.data, batches=change(job.data.batches))
  return dataclasses.replace(job, data=data)


def fit(job: Job, folder: Path):
  """The result of the job's one run; Diverged is raised."""
  [result] = loop.fit(job, folder)
  if isinstance(result, Diverged):
    raise result
  return result


def export(adapter, result, folder: Path) -> dict[str, str]:
  leaves = {"a": adapter["dense/kernel"].a, "head": adapter["head/kernel"].value}
  text = json.dumps({k: np.asarray(v).tolist() for k, v in leaves.items()})
  workdir.write_text(folder / "adapter.json", text)
  return {"adapter": str(folder / "adapter.json")}


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 1)
  run = bucket.folder(sys.argv[1])
  workdir.claim(run, {"toy": 1})
  fit(job(run), run)

"""From settings to a job: the model, the examples, the adapter, and what is written."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import lorax_flax as lx
from experiments.settings import DataSettings, ModelSettings, Settings
from experiments.start import start_from
from lorax_flax.data import load as data
from lorax_flax.data import pipeline, tasks
from lorax_flax.data.tasks import Task
from lorax_flax.data.tokenize import load_tokenizer, tokenize
from lorax_flax.data.tokens import Tokens
from lorax_flax.errors import LoraxError, listing
from lorax_flax.hub import export, peft, peft_config
from lorax_flax.hub.resolve import resolve
from lorax_flax.methods import Adapter, LowRank, Tuned
from lorax_flax.models import registry
from lorax_flax.train import losses, processes
from lorax_flax.train import mesh as meshes
from lorax_flax.train.loop import Job


def prepare(wanted: Settings, say: Callable[[str], None]) -> Job:
  """Loads the model and the examples, and starts the adapter.

  Args:
    say: takes a line for the user.

  Raises:
    LoraxError: what the readers raise; a new head that would not be trained.
  """
  task = tasks.get(wanted.data.task)
  mesh = _mesh(wanted, say)
  folder = resolve(wanted.model.path)
  loaded = registry.load(
    folder,
    num_labels=task.num_labels,
    seed=wanted.train.seed,
    dtype=wanted.model.dtype,
    scan=wanted.model.scan,
    remat=wanted.model.remat,
    new_head=True,
    shardings=functools.partial(_shardings, mesh, say),
  )
  if loaded.new_paths:
    say(f"new, not in the checkpoint: {listing(loaded.new_paths)}")
  train, evaluation = _tokens(wanted.data, task, folder, loaded)
  lengths = [split.lengths_N for split in (train, *evaluation.values())]
  buckets = pipeline.choose_buckets(np.concatenate(lengths), wanted.data.buckets)
  say(
    f"{task.name}: {len(train):,} examples to train on, "
    f"{', '.join(f'{len(s):,} in {name}' for name, s in evaluation.items())}; "
    f"padded to {' or '.join(map(str, buckets))} tokens"
  )

  apply_fn = _apply_fn(_with_dropout(loaded, wanted.model))
  lora = lx.adapt(apply_fn, wanted.lora)
  example = pipeline.evaluation(train, pipeline.Shape(1, buckets))[0]
  adapter = lora.init(
    jax.random.key(wanted.train.seed), loaded.params, _model_inputs(example)
  )
  _check_new(loaded.new_paths, adapter)
  if wanted.init_adapter is not None:
    adapter = start_from(wanted.init_adapter, adapter, loaded, say)
  say(describe(adapter, loaded.params))

  def forward(params, adapter, batch, key):
    keys = (None, None) if key is None else jax.random.split(key)
    return lora.apply(params, adapter, batch, keys[0], dropout_key=keys[1])

  loss = losses.cross_entropy(wanted.train.label_smoothing)
  if task.regression:
    if wanted.train.label_smoothing:
      raise LoraxError(
        f"train.label_smoothing means nothing for {task.name}: no classes"
      )
    loss = losses.squared_error
  shape = pipeline.Shape(wanted.train.batch_size, buckets)
  eval_shape = pipeline.Shape(wanted.train.eval_batch_size, buckets)
  return Job(
    forward=forward,
    params=loaded.params,
    adapter=adapter,
    loss=loss,
    batches=pipeline.training(train, shape, seed=wanted.train.seed),
    steps_per_epoch=pipeline.steps_per_epoch(len(train), shape.batch_size),
    evaluation={
      name: pipeline.evaluation(split, eval_shape) for name, split in evaluation.items()
    },
    metrics=task.metrics,
    primary=task.primary,
    export=_export(wanted, task, folder, loaded),
    title=f"{task.name}, {wanted.model.path}",
    mesh=mesh,
    axes=meshes.names_by_path(loaded.family.logical_axes(loaded.module)),
  )


def _mesh(wanted: Settings, say: Callable[[str], None]) -> Mesh:
  mesh = meshes.make(wanted.mesh)
  train = wanted.train
  meshes.check_batch(mesh, "train.batch_size", train.batch_size, train.accumulation)
  meshes.check_batch(mesh, "train.eval_batch_size", train.eval_batch_size)
  if mesh.size > 1:
    say(meshes.describe(mesh))
  return mesh


def _shardings(
  mesh: Mesh, say: Callable[[str], None], logical_axes: Any, shapes: Any
) -> Any:
  """Where each weight is to lie, as `registry.load` asks."""
  axes = meshes.names_by_path(logical_axes)
  for line in meshes.kept_whole(mesh, axes, shapes):
    say(line)
  return meshes.of_params(mesh, axes, shapes)


def describe(adapter: Adapter, params: Any) -> str:
  """How much is trained, in a line."""
  deltas = [delta for delta in adapter.values() if isinstance(delta, LowRank)]
  tuned = [delta for delta in adapter.values() if isinstance(delta, Tuned)]
  low = sum(getattr(delta, name).size for delta in deltas for name in delta.trained)
  full = sum(delta.value.size for delta in tuned)
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  return (
    f"training {low + full:,} of {total:,} parameters: {low:,} in {len(deltas)} "
    f"low-rank deltas, {full:,} in {len(tuned)} weights in full"
  )


def _with_dropout(loaded: registry.Loaded, model: ModelSettings) -> Any:
  """The module with other rates than its config.json has, where they are given."""
  family = loaded.family
  rates: dict[str, float] = {}
  for option, fields, rate in (
    ("dropout", family.dropout, model.dropout),
    ("head_dropout", family.head_dropout, model.head_dropout),
  ):
    if rate is not None and not fields:
      name = loaded.hf_config["model_type"]
      raise LoraxError(f"model.{option} is {rate}, and a {name} has no such dropout")
    if rate is not None:
      rates |= dict.fromkeys(fields, rate)
  return loaded.module.clone(config=dataclasses.replace(loaded.config, **rates))


def _apply_fn(module: Any) -> Callable[..., jax.Array]:
  def apply_fn(params, batch, dropout_key=None):
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return module.apply(
      {"params": params}, **batch, deterministic=dropout_key is None, rngs=rngs
    )

  return apply_fn


def _model_inputs(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {name: x for name, x in batch.items() if x.ndim == 2}


def _tokens(
  data_settings: DataSettings, task: Task, folder: Path, loaded: registry.Loaded
) -> tuple[Tokens, dict[str, Tokens]]:
  """The training split, and the evaluation splits by name."""
  if data_settings.max_length > loaded.max_length:
    raise LoraxError(
      f"data.max_length is {data_settings.max_length}, and this model takes at most "
      f"{loaded.max_length} tokens"
    )
  splits = data.load(
    task.name, glue_dir=data_settings.glue_dir, tfds_dir=data_settings.tfds_dir
  )
  tokenizer = load_tokenizer(folder)
  rows = {
    name: tokenize(
      examples,
      tokenizer,
      max_length=data_settings.max_length,
      token_types=loaded.token_types,
      regression=task.regression,
    )
    for name, examples in {"train": splits.train, **splits.evaluation}.items()
  }
  return rows.pop("train"), rows


def _check_new(new_paths: Any, adapter: Adapter) -> None:
  left = [path for path in new_paths if not isinstance(adapter.get(path), Tuned)]
  if left:
    raise LoraxError(
      f"the checkpoint has no {listing(left, most=4)}: it would stay as random as it "
      "starts. Name it in lora.tuned"
    )


def _export(
  wanted: Settings, task: Task, folder: Path, loaded: registry.Loaded
) -> Callable[[Adapter, Path], dict[str, str]]:
  labels = task.labels or ("score",)

  def write(adapter: Adapter, workdir: Path) -> dict[str, str]:
    if any(isinstance(delta, LowRank) for delta in adapter.values()):
      target = workdir / "adapter"
      if not processes.first():
        return {"adapter": str(target)}
      peft.write_adapter(
        target,
        adapter,
        loaded.keymap,
        wanted.lora,
        base_name=wanted.model.path,
        labels=labels,
        task_type=peft_config.TASK_TYPES[loaded.family.task],
      )
      return {"adapter": str(target)}
    # Nothing in it is low-rank: as an adapter it would be the model all over.
    target = workdir / "model"
    merged = meshes.gather(lx.merge(loaded.params, adapter))
    if not processes.first():
      return {"model": str(target)}
    export.write_checkpoint(
      target,
      merged,
      loaded.keymap,
      loaded.hf_config,
      architecture=loaded.family.architecture,
      labels=labels,
      tokenizer_from=folder,
      may_replace=lambda old: (old / "config.json").is_file(),
    )
    return {"model": str(target)}

  return write

"""The steps from settings to a job: mesh, model, task's data, adapter."""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import lorax_flax as lx
from lorax_flax import quant
from lorax_flax.adapt import training
from lorax_flax.adapt.config import LoraConfig, with_tuned
from lorax_flax.adapt.partition import absent, replaced, without, without_replaced
from lorax_flax.adapt.paths import flatten
from lorax_flax.adapt.plan import Plan
from lorax_flax.adapt.transform import Adapted
from lorax_flax.data import pipeline, tokens
from lorax_flax.data.config import DataSettings
from lorax_flax.data.pairs import Pairs
from lorax_flax.data.pipeline import Rows
from lorax_flax.data.tokens import Tokens
from lorax_flax.errors import LoraxError, listing
from lorax_flax.hub.peft import folder as peft
from lorax_flax.hub.resolve import resolve
from lorax_flax.jobs import outline
from lorax_flax.jobs.export import form
from lorax_flax.jobs.warm_start import start_from
from lorax_flax.methods import Adapter, Tuned
from lorax_flax.models import registry
from lorax_flax.models.settings import ModelSettings
from lorax_flax.models.soft import SoftSettings
from lorax_flax.sharding import mesh as meshes
from lorax_flax.sharding.mesh import MeshConfig
from lorax_flax.tasks.task import Splits, Task
from lorax_flax.train.config import TrainConfig
from lorax_flax.train.logs import memory
from lorax_flax.train.loop import Data
from lorax_flax.train.objective import Objective
from lorax_flax.train.samples import Samples
from lorax_flax.train.step import Forward

log = logging.getLogger(__name__)


def mesh(config: MeshConfig, train: TrainConfig, devices: Any = None) -> Mesh:
  """The mesh of all devices, or of these; batches can be sharded evenly over it."""
  made = meshes.make(config, devices)
  check_batches(made, train)
  if made.size > 1:
    log.info(meshes.describe(made))
  return made


def check_batches(mesh: Mesh, train: TrainConfig) -> None:
  """Raises LoraxError unless batches can be sharded evenly."""
  meshes.check_batch(mesh, "train.batch_size", train.batch_size, train.accumulation)
  meshes.check_batch(mesh, "train.eval_batch_size", train.eval_batch_size)


def model(
  settings: ModelSettings,
  task: Task,
  max_length: int,
  mesh: Mesh,
  seed: int,
  init_from: str | None = None,
  soft: SoftSettings | None = None,
) -> registry.Loaded:
  """The model, read from disk into its shards.

  Args:
    max_length: number of tokens that it has to take.
    seed: of the weights that the checkpoint lacks.
    init_from: a PEFT folder that the model is to fit.
    soft: trained states beside the weights.

  Raises:
    LoraxError: what the readers raise; a model that does not fit the task.
  """
  settings = outline.for_adapter(settings, init_from)
  folder = resolve(settings.path)
  hf_config = registry.read_config(folder)
  described = outline.check(settings, task, max_length, hf_config, str(folder), soft)
  outline.check_tokens(described, max_length, mesh)
  loaded = registry.load(
    folder,
    num_labels=task.num_labels,
    seed=seed,
    dtype=settings.dtype,
    param_dtype=settings.param_dtype,
    scan=settings.scan,
    remat=settings.remat,
    new_head=True,
    shardings=functools.partial(_shardings, mesh),
    untie=settings.untie,
    vocab_size=settings.vocab_size,
    quant=settings.quant,
    soft=soft,
  )
  if init_from is not None:
    tables = peft.with_tables(init_from, loaded.params, loaded.keymap)
    loaded = dataclasses.replace(loaded, params=tables)
  if loaded.new_paths:
    log.info(f"new, not in the checkpoint: {listing(loaded.new_paths)}")
  return loaded


def axes(model: registry.Outline) -> meshes.Axes:
  """Names of the axes of every leaf of a model's weights."""
  return meshes.names_by_path(model.family.logical_axes(model.module))


def _shardings(mesh: Mesh, logical_axes: Any, shapes: Any) -> Any:
  """The sharding of each weight, as `registry.load` takes it."""
  axes = meshes.names_by_path(logical_axes)
  for line in meshes.not_sharded(mesh, axes, shapes):
    log.info(line)
  return meshes.of_params(mesh, axes, shapes)


def rows(
  settings: DataSettings, task: Task, model: registry.Loaded, mesh: Mesh
) -> tuple[Splits[Rows], tuple[int, ...]]:
  """The task's rows, and the padded lengths of their batches."""
  splits = task.read(settings, model)
  train, evaluation = splits
  for name, split in {"train": train, **evaluation}.items():
    _check_ids(f"{task.name}, {name}", split, model)
  lengths = [split.lengths_N for split in (train, *evaluation.values())]
  all_N = np.concatenate(lengths)
  lengths_padded = padded_lengths(all_N, settings.buckets, model, mesh)
  sizes = [f"{len(s):,} in {name}" for name, s in evaluation.items()]
  padded = f"; padded to {' or '.join(map(str, lengths_padded))} tokens"
  log.info(
    f"{task.name}: {len(train):,} examples to train on, {', '.join(sizes)}"
    f"{padded if model.max_length else ''}"
  )
  for line in () if task.describe is None else task.describe(settings, model):
    log.info(line)
  return splits, lengths_padded


def samples(
  settings: DataSettings,
  task: Task,
  model: registry.Loaded,
  splits: Splits[Rows],
) -> Samples | None:
  """Prompts that are answered at each evaluation; None, logged, where they can't be."""
  if task.samples is None:
    return None
  try:
    made = task.samples(settings, model, splits)
    if made is not None and jax.process_count() > 1:
      raise LoraxError("that is for one process")
  except LoraxError as error:
    log.info(f"no prompts are answered while training: {error}")
    return None
  return made


def _check_ids(name: str, split: Rows, model: registry.Loaded) -> None:
  """Raises LoraxError for a token id that the embeddings have no row for."""
  if isinstance(split, Pairs):
    split = split.tokens
  if not isinstance(split, Tokens):
    return
  types = getattr(model.config, "type_vocab_size", 0)
  try:
    tokens.check_ids(split, model.config.vocab_size, types)
  except LoraxError as error:
    raise LoraxError(
      f"{name}: {error}: the tokenizer in {model.folder} has tokens that the model's "
      "vocabulary has not. --config.model.vocab_size=N gives it rows for N tokens"
    ) from error


def padded_lengths(
  lengths_N: np.ndarray, count: int, model: registry.Outline, mesh: Mesh
) -> tuple[int, ...]:
  """Padded lengths, at most `count`, none longer than the model takes; 1 of images.

  Multiples of the devices along which tokens are sharded.
  """
  if not model.max_length:
    return (1,)
  ways = mesh.shape["sequence"]
  most = model.max_length - model.max_length % ways
  chosen = pipeline.choose_buckets(lengths_N, count)
  return tuple(sorted({min(length + -length % ways, most) for length in chosen}))


def train_batches(
  train: Rows, lengths: tuple[int, ...], config: TrainConfig
) -> Iterator[pipeline.Batch]:
  """Training batches without end, in the order of a seed."""
  shape = pipeline.Shape(config.batch_size, lengths)
  return pipeline.training(train, shape, seed=config.seed)


def batches(
  splits: Splits[Rows], lengths: tuple[int, ...], configs: Sequence[TrainConfig]
) -> Data:
  """Batches of N >= 1 runs, whose order is each one's seed's."""
  first = configs[0]
  shape = pipeline.Shape(first.batch_size, lengths)
  eval_shape = pipeline.Shape(first.eval_batch_size, lengths)
  seeds = [config.seed for config in configs]
  return Data(
    train_batches(splits.train, lengths, first)
    if len(configs) == 1
    else pipeline.Together(splits.train, shape, seeds=seeds),
    pipeline.steps_per_epoch(len(splits.train), first.batch_size),
    {
      name: pipeline.evaluation(split, eval_shape)
      for name, split in splits.evaluation.items()
    },
  )


# The columns of a batch that are not the model's inputs.
_ASIDE = ("labels", "weights", "index")


def adapt(
  model: registry.Outline,
  settings: ModelSettings,
  config: LoraConfig,
  objective: Objective,
) -> tuple[Adapted, Forward]:
  """The transform of the model, and the forward function of the training step.

  Leaves that the model has beside its checkpoint's are trained in full.
  Both take batches with all their columns: a readout needs the labels.
  """
  module = with_dropout(model, settings)

  def apply_fn(params, batch, dropout_key=None):
    options: dict[str, Any] = {}
    if (readout := objective.readout) is not None:
      options["readout"] = lambda head, x_BxTxD: readout(head, x_BxTxD, batch)
    if dropout_key is not None:
      options["rngs"] = {"dropout": dropout_key}
    given = {name: x for name, x in batch.items() if name not in _ASIDE}
    return module.apply(
      {"params": params}, **given, deterministic=dropout_key is None, **options
    )

  lora = lx.adapt(apply_fn, with_tuned(config, model.soft_paths))

  def forward(params, adapter, batch, key):
    keys = (None, None) if key is None else jax.random.split(key)
    return lora.apply(params, adapter, batch, keys[0], lora_dropout_key=keys[1])

  return lora, forward


def with_dropout(model: registry.Outline, settings: ModelSettings) -> Any:
  """The module with the settings' rates in place of its config.json's, where given.

  Raises:
    LoraxError: a rate that the family does not have.
  """
  family = model.family
  rates: dict[str, float] = {}
  for option, fields, rate in (
    ("dropout", family.dropout, settings.dropout),
    ("head_dropout", family.head_dropout, settings.head_dropout),
  ):
    if rate is not None and not fields:
      name = model.hf_config["model_type"]
      raise LoraxError(f"model.{option} is {rate}, and a {name} has no such dropout")
    if rate is not None:
      rates |= dict.fromkeys(fields, rate)
  return model.module.clone(config=dataclasses.replace(model.config, **rates))


def plan(
  lora: Adapted, model: registry.Loaded, splits: Splits[Rows], lengths: tuple[int, ...]
) -> Plan:
  """The plan of the adapter, by a batch of one row."""
  example = pipeline.evaluation(splits.train, pipeline.Shape(1, lengths))[0]
  return lora.plan(model.params, example)


def adapter(
  made: Adapter, model: registry.Loaded, init_from: str | None = None
) -> Adapter:
  """The adapter before the first step.

  Args:
    made: as it starts by itself.
    init_from: a PEFT folder whose weights it starts from.

  Raises:
    LoraxError: a new head that would not be trained; a folder that does not fit.
  """
  _check_new(model.new_paths, made)
  return made if init_from is None else start_from(init_from, made, model)


def released(
  model: registry.Loaded, adapter: Adapter
) -> tuple[registry.Loaded, Adapter]:
  """The model and the adapter without what no step and no export reads.

  Where a model is written and no adapter, these are the base's leaves that are trained
  in full: `absent` takes their place. Training then has the base in memory once.
  """
  if form(adapter, model.keymap) != "model":
    return model, adapter
  params = without_replaced(model.params, adapter, absent)
  kept = without(adapter, lambda delta: delta.from_base if delta.replaces else ())
  return dataclasses.replace(model, params=params), kept


def _check_new(new_paths: Sequence[str], adapter: Adapter) -> None:
  left = [path for path in new_paths if not isinstance(adapter.get(path), Tuned)]
  if left:
    raise LoraxError(
      f"the checkpoint has no {listing(left, most=4)}: it would stay as random as it "
      "starts. Name it in lora.tuned"
    )


def describe(plan: Plan, adapter: Adapter, params: Any) -> dict[str, str]:
  """The number of trained parameters and the memory of the frozen base, in sentences.

  One of what the targets cover and was left out, where anything was.
  """
  tuned = {path: delta for path, delta in adapter.items() if isinstance(delta, Tuned)}
  deltas = {path: delta for path, delta in adapter.items() if path not in tuned}
  low, full = training.size(deltas), training.size(tuned)
  leaves, gone = flatten(params), replaced(adapter)
  read = [x for path, x in leaves.items() if path not in gone]
  stored_as = sorted(
    {quant.name_of(x) if quant.is_quantized(x) else x.dtype.name for x in read}
  )
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(read))
  base = f"the base is in memory as {' and '.join(stored_as)}: {memory.show(size)}"
  left_out = plan.summary()
  return {
    "trained": f"training {low + full:,} of {sum(x.size for x in leaves.values()):,} "
    f"parameters: {low:,} in {len(deltas)} low-rank deltas, {full:,} in {len(tuned)} "
    "weights in full",
    **({"left out": f"left out of the targets: {left_out}"} if left_out else {}),
    "base": base if read else "no base is in memory: all of it is trained",
  }

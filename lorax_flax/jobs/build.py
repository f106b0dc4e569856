"""From settings to a job: the model, the examples, the adapter, and what is written."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.cli import command as cli
from lorax_flax.data import pipeline
from lorax_flax.errors import LoraxError, listing
from lorax_flax.hub.resolve import resolve
from lorax_flax.jobs import adapted, shape
from lorax_flax.jobs import export as outcome
from lorax_flax.jobs.settings import NEXT_TOKEN, Settings
from lorax_flax.jobs.warm_start import start_from
from lorax_flax.methods import Adapter, Tuned
from lorax_flax.models import registry
from lorax_flax.sharding import mesh as meshes
from lorax_flax.tasks import causal_lm, classification
from lorax_flax.tasks.task import Kind
from lorax_flax.train import step as steps
from lorax_flax.train.loop import Job


@dataclasses.dataclass(frozen=True)
class Material:
  """What a job is made of, that no seed, rank or learning rate changes.

  Attributes:
    kind: of the task.
    mesh: the devices.
    axes: names of the axes of every leaf of the model's weights.
    loaded: the model; what its checkpoint lacks is drawn by a seed.
    train, evaluation: the rows.
    padded_to: lengths of batches.
  """

  kind: Kind
  mesh: Mesh
  axes: meshes.Axes
  loaded: registry.Loaded
  train: pipeline.Rows
  evaluation: Mapping[str, pipeline.Rows]
  padded_to: tuple[int, ...]


def prepare(wanted: Settings, say: Callable[[str], None]) -> Job:
  """Loads the model and the examples, and starts the adapter.

  Args:
    say: takes a line for the user.

  Raises:
    LoraxError: what the readers raise; a new head that would not be trained.
  """
  return start(wanted, gather(wanted, say), say)


def prepare_several(
  wanted: Sequence[Settings], say: Callable[[str], None]
) -> tuple[list[Job], Any]:
  """Jobs that train together, and their batches; what they share is loaded once.

  Args:
    wanted: of each; they differ in the seed, and in what no weight or example depends
      on.
    say: takes a line for the user, of the first job where it is of one.
  """
  material = gather(wanted[0], say)
  jobs: list[Job] = []
  for each in wanted:
    loaded = material.loaded
    if each.train.seed != wanted[0].train.seed:
      loaded = loaded.reseeded(each.train.seed)
    own = dataclasses.replace(material, loaded=loaded)
    jobs.append(start(each, own, cli.silent if jobs else say))
  shape = pipeline.Shape(wanted[0].train.batch_size, material.padded_to)
  seeds = [each.train.seed for each in wanted]
  return jobs, pipeline.together(material.train, shape, seeds=seeds)


def gather(wanted: Settings, say: Callable[[str], None]) -> Material:
  """Loads the model and the examples."""
  kind = kind_of(wanted)
  mesh = meshes.make(wanted.mesh)
  check_mesh(mesh, wanted, say)
  folder = resolve(wanted.model.path)
  shape.check(wanted, kind, registry.read_config(folder), str(folder))
  loaded = registry.load(
    folder,
    num_labels=kind.num_labels,
    seed=wanted.train.seed,
    dtype=wanted.model.dtype,
    param_dtype=wanted.model.param_dtype,
    scan=wanted.model.scan,
    remat=wanted.model.remat,
    new_head=True,
    shardings=functools.partial(_shardings, mesh, say),
  )
  if loaded.new_paths:
    say(f"new, not in the checkpoint: {listing(loaded.new_paths)}")
  train, evaluation = kind.read(loaded, say)
  lengths = [split.lengths_N for split in (train, *evaluation.values())]
  padded_to = buckets(np.concatenate(lengths), wanted.data.buckets, loaded)
  say(
    f"{kind.name}: {len(train):,} examples to train on, "
    f"{', '.join(f'{len(s):,} in {name}' for name, s in evaluation.items())}; "
    f"padded to {' or '.join(map(str, padded_to))} tokens"
  )

  axes = meshes.names_by_path(loaded.family.logical_axes(loaded.module))
  return Material(kind, mesh, axes, loaded, train, evaluation, padded_to)


def start(wanted: Settings, material: Material, say: Callable[[str], None]) -> Job:
  """Starts the adapter."""
  kind, loaded, train = material.kind, material.loaded, material.train
  padded_to = material.padded_to
  lora, forward = adapted.adapt(loaded, wanted)
  example = pipeline.evaluation(train, pipeline.Shape(1, padded_to))[0]
  adapter = lora.init(
    jax.random.key(wanted.train.seed), loaded.params, steps.inputs(example)
  )
  _check_new(loaded.new_paths, adapter)
  if wanted.init_adapter is not None:
    adapter = start_from(wanted.init_adapter, adapter, loaded, say)
  for line in describe(adapter, loaded.params):
    say(line)
  batches = pipeline.Shape(wanted.train.batch_size, padded_to)
  eval_batches = pipeline.Shape(wanted.train.eval_batch_size, padded_to)
  return Job(
    forward=forward,
    params=loaded.params,
    adapter=adapter,
    loss=kind.loss,
    batches=pipeline.training(train, batches, seed=wanted.train.seed),
    steps_per_epoch=pipeline.steps_per_epoch(len(train), batches.batch_size),
    evaluation={
      name: pipeline.evaluation(split, eval_batches)
      for name, split in material.evaluation.items()
    },
    metrics=kind.metrics,
    primary=kind.primary,
    export=outcome.export(wanted, kind, loaded),
    title=f"{kind.name}, {wanted.model.path}",
    mesh=material.mesh,
    axes=material.axes,
    eval_loss=kind.eval_loss,
    predictions=kind.predictions,
  )


def kind_of(wanted: Settings) -> Kind:
  """What the task of a run brings."""
  return (causal_lm if wanted.data.task == NEXT_TOKEN else classification).kind(wanted)


def buckets(
  lengths_N: np.ndarray, most: int, model: registry.Outline
) -> tuple[int, ...]:
  """The lengths that batches are padded to: none that the model does not take."""
  chosen = pipeline.choose_buckets(lengths_N, most)
  return tuple(sorted({min(length, model.max_length) for length in chosen}))


def check_mesh(mesh: Mesh, wanted: Settings, say: Callable[[str], None]) -> None:
  """Raises LoraxError unless batches can be spread evenly."""
  train = wanted.train
  meshes.check_batch(mesh, "train.batch_size", train.batch_size, train.accumulation)
  meshes.check_batch(mesh, "train.eval_batch_size", train.eval_batch_size)
  if mesh.size > 1:
    say(meshes.describe(mesh))


def _shardings(
  mesh: Mesh, say: Callable[[str], None], logical_axes: Any, shapes: Any
) -> Any:
  """Where each weight is to lie, as `registry.load` asks."""
  axes = meshes.names_by_path(logical_axes)
  for line in meshes.kept_whole(mesh, axes, shapes):
    say(line)
  return meshes.of_params(mesh, axes, shapes)


def describe(adapter: Adapter, params: Any) -> list[str]:
  """How much is trained, and what the frozen base takes in memory; a line each."""
  tuned = [delta for delta in adapter.values() if isinstance(delta, Tuned)]
  deltas = [delta for delta in adapter.values() if not isinstance(delta, Tuned)]
  low, full = (
    sum(delta.leaves()[name].size for delta in group for name in delta.trained)
    for group in (deltas, tuned)
  )
  leaves = jax.tree.leaves(params)
  dtypes = sorted({leaf.dtype.name for leaf in leaves})
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  return [
    f"training {low + full:,} of {sum(leaf.size for leaf in leaves):,} parameters: "
    f"{low:,} in {len(deltas)} low-rank deltas, {full:,} in {len(tuned)} weights in "
    "full",
    f"the base lies in memory as {' and '.join(dtypes)}: {_bytes(size)}",
  ]


def _bytes(count: int) -> str:
  return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _check_new(new_paths: Any, adapter: Adapter) -> None:
  left = [path for path in new_paths if not isinstance(adapter.get(path), Tuned)]
  if left:
    raise LoraxError(
      f"the checkpoint has no {listing(left, most=4)}: it would stay as random as it "
      "starts. Name it in lora.tuned"
    )

"""Training an adapter of any function, in one call."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.adapt.transform import Adapted
from lorax_flax.distributed import processes
from lorax_flax.errors import LoraxError, check_known
from lorax_flax.files import lock
from lorax_flax.files import workdir as files
from lorax_flax.hub import card
from lorax_flax.hub.adapters import native
from lorax_flax.methods import Adapter
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train import loop
from lorax_flax.train.config import TrainConfig
from lorax_flax.train.logs.history import Diverged
from lorax_flax.train.logs.page import About
from lorax_flax.train.objective import Objective
from lorax_flax.train.step import Model
from lorax_flax.train.stream import Layout, Stream
from lorax_flax.train.trials import Run

PyTree = Any

_LOAD = """\
import lorax_flax as lx
from lorax_flax.hub.adapters import native

saved = native.read_adapter(FOLDER, params)  # params: the base's
params = lx.merge(params, saved.adapter)
"""


class Fitted(NamedTuple):
  """A trained adapter.

  Attributes:
    adapter: the best evaluation's, or the last one where nothing is evaluated.
    result: content of result.json: metrics, steps, seconds.
    history: lines of metrics.jsonl, oldest first.
  """

  adapter: Adapter
  result: dict[str, Any]
  history: list[dict[str, Any]]


def fit(
  lora: Adapted,
  params: PyTree,
  batches: Iterable[Any],
  loss: Callable[[Any, Any], jax.Array],
  *,
  inputs: Callable[[Any], Sequence[Any]] | None = None,
  adapter: Adapter | None = None,
  evaluation: Iterable[Any] = (),
  workdir: str | Path | None = None,
  mesh: meshes.MeshConfig | None = None,
  axes: meshes.Axes | None = None,
  **train: Any,
) -> Fitted:
  """Trains an adapter of any function.

      lora = lx.adapt(lambda params, x: model.apply({"params": params}, x), config)
      fitted = lx.fit(lora, params, batches, loss, steps=100, learning_rate=1e-3)
      outputs = lora.apply(params, fitted.adapter, x)

  Args:
    lora: the transform of the function; see `lorax_flax.adapt`.
    params: the frozen base.
    batches: dicts, tuples or other pytrees of arrays with a leading axis B. A list, a
      loader or an iterator; one that ends is started anew. A resumed run restores its
      position by the iterator's `set_state`, where it has that and `get_state`, else by
      passing over the batches it has seen.
    loss: (outputs, batch) -> the loss of each example, (B,), or their mean.
    inputs: (batch) -> arguments of the function besides params; None: all but the last
      entry of a tuple, or a dict as one argument.
    adapter: where to start; None: `lora.init` by the seed.
    evaluation: batches to evaluate after each epoch, each once; the adapter with the
      lowest loss is kept. None by default.
    workdir: folder for checkpoints, metrics, curves and the adapter. The same call
      resumes a run that was killed, with the same numbers to the last bit.
    mesh: devices along each axis; None: one device.
    axes: logical names of the axes of each leaf of params, for weights that are to be
      sharded (`lorax_flax.sharding.mesh.RULES`); None: they are replicated.
    train: fields of `TrainConfig`: steps or epochs, learning_rate, warmup_steps, …

  Returns:
    The adapter, the result and the history.

  Raises:
    LoraxError: an unknown field, batches that differ in structure, none at all, or a
      loss of another shape; `Diverged`.
    processes.Preempted: SIGTERM asked for it; everything is saved in workdir.
  """
  stream = Stream(batches)
  layout, first = stream.layout, stream.first
  size = len(first["weights"])
  config = _config(train, size)
  devices = jax.devices()[:1] if mesh is None else None
  made = meshes.make(mesh or meshes.MeshConfig(), devices)
  if made.shape["sequence"] > 1:
    raise LoraxError("mesh.sequence: a function of your own shards its own tokens")
  meshes.check_batch(made, "the number of rows of a batch", size, config.accumulation)
  axes = meshes.replicated_axes(params) if axes is None else axes
  params = meshes.place(params, meshes.of_params(made, axes, params))
  arguments = _positional if inputs is None else inputs
  if adapter is None:
    key = jax.random.key(config.seed)
    adapter = lora.init(key, params, *arguments(layout.batch(first)))

  def forward(params, adapter, columns, key):
    given = arguments(layout.batch(columns))
    return lora.apply(params, adapter, *given, lora_dropout_key=key)

  def per_example(outputs, columns):
    value = jnp.asarray(loss(outputs, layout.batch(columns)), jnp.float32)
    shape = columns["weights"].shape
    if value.shape not in ((), shape):
      raise LoraxError(f"the loss has shape {value.shape}, and may have () or {shape}")
    return jnp.broadcast_to(value, shape)

  settings: dict[str, Any] = {"train": config, "lora": lora.config}
  about = About(
    "Fit of an adapter",
    settings={name: dataclasses.asdict(each) for name, each in settings.items()},
    usage={"Load": _LOAD},
  )
  kept: list[Adapter] = []

  def export(
    adapter: Adapter, result: Mapping[str, Any], folder: Path
  ) -> Mapping[str, str]:
    kept.append(adapter)
    if workdir is None:
      return {}
    if processes.first():
      saved = native.Saved(adapter, lora.config)
      native.write_adapter(folder / "adapter", saved, _card(about, result))
    return {"adapter": str(folder / "adapter")}

  with contextlib.ExitStack() as stack:
    if workdir is None:
      folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    else:
      folder = Path(workdir)
      if processes.first():
        stack.enter_context(lock.held(folder))
      files.claim(folder, about.settings)
    job = loop.Job(
      [Run(config, dict(adapter), folder, export, about)],
      Model(forward, params, axes, made),
      Objective(per_example, (), "eval_loss", predictions=lambda outputs: None),
      loop.Data(
        stream,
        _steps_per_epoch(batches, config),
        _splits(evaluation, layout),
      ),
    )
    [result] = loop.fit(job, folder)
    if isinstance(result, Diverged):
      raise result
    assert result is not None  # There is no judge.
    lines = (folder / files.METRICS).read_text("utf-8").splitlines()
  return Fitted(kept[0], result, [json.loads(line) for line in lines])


def _card(about: About, result: Mapping[str, Any]) -> str:
  fields = ("method", "rank", "alpha", "targets", "tuned")
  lora = {name: str(about.settings["lora"][name]) for name in fields}
  tags = ["lorax_flax", lora["method"]]
  scores = {name: result[name] for name in result["last"]}
  data = {"library_name": "lorax_flax", "tags": tags}
  return card.text(about.title, data, {"Adapter": lora}, about.usage, scores, "own")


def _config(train: Mapping[str, Any], batch_size: int) -> TrainConfig:
  fields = [field.name for field in dataclasses.fields(TrainConfig)]
  for name in train:
    check_known("field of TrainConfig", name, fields)
  return TrainConfig(**({"batch_size": batch_size} | dict(train)))


def _positional(batch: Any) -> Sequence[Any]:
  return batch[:-1] if isinstance(batch, tuple | list) else (batch,)


def _steps_per_epoch(batches: Any, config: TrainConfig) -> int:
  """Number of batches in an epoch: all steps, where the batches have no length."""
  if hasattr(batches, "__len__"):
    return len(batches)
  if config.steps is None:
    raise LoraxError("batches have no length: give steps, not epochs")
  return config.steps


def _splits(
  evaluation: Iterable[Any], layout: Layout
) -> dict[str, list[dict[str, np.ndarray]]]:
  """Evaluation batches as the loop takes them: with the examples' numbers."""
  found: list[dict[str, np.ndarray]] = []
  count = 0
  for batch in evaluation:
    columns = layout.columns(batch)
    size = len(columns["weights"])
    found.append(columns | {"index": np.arange(count, count + size, dtype=np.int32)})
    count += size
  return {"validation": found} if found else {}

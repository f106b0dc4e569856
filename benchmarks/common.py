"""The training steps that the benchmarks measure: an encoder's and a decoder's."""

import contextlib
import dataclasses
import datetime
import functools
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import lorax_flax as lx
from lorax_flax.adapt.partition import partition, trainable_mask
from lorax_flax.hub.checkpoints import quantized
from lorax_flax.models import registry
from lorax_flax.models.bert import model as bert
from lorax_flax.models.bert.config import EncoderConfig
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train import losses, optim
from lorax_flax.train import state as states
from lorax_flax.train import step as steps
from lorax_flax.train.token_scores import next_labels, token_scores


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of the model, its batch and its deltas.

  Attributes:
    model: a key of `MODELS`.
    kv_heads: heads of keys and values, where a model has fewer of them.
    tied: whether a decoder's head is its table of embeddings.
  """

  layers: int = 12
  hidden: int = 768
  heads: int = 12
  mlp: int = 3072
  vocab: int = 50265
  batch: int = 16
  length: int = 128
  rank: int = 8
  dropout: float = 0.0
  model: str = "roberta"
  kv_heads: int | None = None
  tied: bool = True


ROBERTA_BASE = Shape()
SMOLLM2 = Shape(30, 576, 9, 1536, 49152, batch=4, length=256, model="llama", kv_heads=3)
LLAMA_1B = Shape(
  16, 2048, 32, 8192, 128256, batch=4, length=2048, rank=16, model="llama", kv_heads=8
)
LLAMA_8B = dataclasses.replace(LLAMA_1B, layers=32, hidden=4096, mlp=14336, tied=False)
SHAPES = {"roberta-base": ROBERTA_BASE, "smollm2": SMOLLM2}


@dataclasses.dataclass(frozen=True)
class Model:
  """A model to train.

  Attributes:
    module: (shape, dtype, scan) -> module.
    methods: ways to train, as arguments of LoraConfig.
    loss: outputs, batch -> losses_B.
    labels: ids_BxT -> labels.
    readout: (head, x_BxTxD, batch) -> outputs; None: logits.
  """

  module: Any
  methods: dict[str, dict[str, Any]]
  loss: losses.Loss
  labels: Any
  readout: Any = None


@dataclasses.dataclass(frozen=True)
class Job:
  """A step and its arguments: arrays, or ShapeDtypeStructs to compile only."""

  step: Any
  state: states.TrainState
  base: states.Base
  batch: dict[str, Any]
  plan: lx.Plan
  mesh: jax.sharding.Mesh | None = None

  def lower(self) -> Any:
    with jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext():
      return self.step.lower(self.state, self.base, self.batch)

  def compile(self) -> Any:
    return self.lower().compile()


def _encoder(shape: Shape, dtype: str, scan: bool, remat: str) -> nn.Module:
  config = EncoderConfig(
    model_type="roberta",
    vocab_size=shape.vocab,
    hidden_size=shape.hidden,
    num_hidden_layers=shape.layers,
    num_attention_heads=shape.heads,
    intermediate_size=shape.mlp,
    pad_token_id=1,
    max_position_embeddings=max(514, shape.length + 2),
    type_vocab_size=1,
    layer_norm_eps=1e-5,
    hidden_dropout_prob=shape.dropout,
    attention_probs_dropout_prob=shape.dropout,
  )
  return bert.SequenceClassifier(config, jnp.dtype(dtype), scan, remat)


def _decoder(shape: Shape, dtype: str, scan: bool, remat: str) -> nn.Module:
  config = decoder_config(shape)
  return registry.outline(config, dtype=dtype, scan=scan, remat=remat).module


def decoder_config(shape: Shape) -> dict[str, Any]:
  """The config.json of a Llama."""
  return {
    "model_type": "llama",
    "vocab_size": shape.vocab,
    "hidden_size": shape.hidden,
    "num_hidden_layers": shape.layers,
    "num_attention_heads": shape.heads,
    "num_key_value_heads": shape.kv_heads or shape.heads,
    "intermediate_size": shape.mlp,
    "max_position_embeddings": max(2048, shape.length),
    "attention_dropout": shape.dropout,
    "tie_word_embeddings": shape.tied,
  }


MODELS = {
  "llama": Model(
    _decoder,
    {
      "query_value": {"targets": ["q_proj", "v_proj"]},
      "all_linear": {"targets": "all-linear"},
      "dora": {"targets": "all-linear", "method": "dora"},
      "full": {"targets": (), "tuned": ".*"},
    },
    losses.next_token,
    lambda ids_BxT: ids_BxT,
    lambda head, x, batch: token_scores(head, x, next_labels(batch["labels"])),
  ),
  "roberta": Model(
    _encoder,
    {
      "query_value": {
        "targets": ".*/attention/(query|value)/kernel",
        "tuned": "classifier",
      },
      "all_linear": {"targets": "all-linear", "tuned": "classifier"},
      "full": {"targets": (), "tuned": ".*"},
    },
    losses.cross_entropy(0.0),
    lambda ids_BxT: jnp.arange(len(ids_BxT), dtype=jnp.int32) % 2,
  ),
}
METHODS = tuple(MODELS["roberta"].methods)


def job(
  shape: Shape,
  method: str,
  *,
  dtype: str = "float32",
  scan: bool = False,
  remat: str = "none",
  quant: str | None = None,
  abstract: bool = False,
  mesh: jax.sharding.Mesh | None = None,
) -> Job:
  """The training step of `lorax_flax.train` for a method, and its arguments.

  Args:
    method: a key of the model's `methods`.
    dtype: dtype of the computation, and of the frozen weights.
    quant: format of a decoder's frozen kernels.
    abstract: makes shapes instead of arrays, to compile without running.
    mesh: devices to shard over as in training; only for shapes.
  """
  assert abstract or mesh is None
  made = MODELS[shape.model]
  model = made.module(shape, dtype, scan, remat)
  ids_BxT = jax.ShapeDtypeStruct((shape.batch, shape.length), jnp.int32)
  columns = jax.eval_shape(lambda: _batch(shape))

  def options(batch):
    if made.readout is None:
      return {}
    return {"readout": lambda head, x_BxTxD: made.readout(head, x_BxTxD, batch)}

  lora = lx.adapt(
    lambda params, batch, key=None: model.apply(
      {"params": params},
      batch["input_ids"],
      batch["attention_mask"],
      deterministic=key is None,
      rngs=None if key is None else {"dropout": key},
      **options(batch),
    ),
    lx.LoraConfig(rank=shape.rank, alpha=16.0, **made.methods[method]),
  )

  def forward(params, adapter, batch, key):
    return lora.apply(params, adapter, batch, key if shape.dropout else None)

  optimizer = optim.optimizer(
    _rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, grad_clip=1.0
  )
  shapes = shapes_of(model, dtype, ids_BxT)
  if quant is not None:
    keymap = registry.outline(decoder_config(shape), scan=scan).keymap
    shapes = quantized.shapes(shapes, quantized.formats(keymap, quant))
  plan = lora.plan(shapes, columns)

  def make(params):
    adapter = lora.init(jax.random.key(1), params, columns)
    return states.create(params, adapter, optimizer, jax.random.key(2))

  state, base = jax.eval_shape(make, shapes) if abstract else make(drawn(shapes))
  batch = columns if abstract else _batch(shape)
  shardings = None
  if mesh is not None:
    axes = meshes.names_by_path(_axes(model, ids_BxT))
    _, adapter = base.full(state.trained)
    adapter_shardings = states.own(meshes.of_adapter(mesh, axes, adapter))
    shardings = states.shardings(state, adapter_shardings, mesh)
    mask = trainable_mask(adapter_shardings)
    rest = partition(adapter_shardings, mask)[1]
    params = meshes.of_params(mesh, axes, base.params)
    state, base = _with_shardings((state, base), (shardings, states.Base(params, rest)))
    batch = _with_shardings(batch, dict.fromkeys(batch, meshes.batch(mesh)))
  step = steps.train_step(forward, made.loss, optimizer, _rate)
  step = steps.jitted(step, shardings)
  return Job(step, state, base, batch, plan, mesh)


def _axes(model, ids_BxT) -> Any:
  boxed = jax.eval_shape(model.init, jax.random.key(0), ids_BxT, ids_BxT)["params"]
  return nn.get_partition_spec(boxed)


def _with_shardings(shapes, shardings) -> Any:
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    shapes,
    shardings,
  )


def shapes_of(model: nn.Module, dtype: str, ids_BxT: Any) -> Any:
  """The shapes of a model's weights, all of one dtype."""
  boxed = jax.eval_shape(model.init, jax.random.key(0), ids_BxT, ids_BxT)["params"]
  return jax.tree.map(
    lambda box: jax.ShapeDtypeStruct(box.value.shape, jnp.dtype(dtype)),
    boxed,
    is_leaf=lambda x: hasattr(x, "names"),
  )


def drawn(shapes: Any) -> Any:
  """Arrays in the place of a tree's shapes: ones for a norm's scales, else random.

  A program for each shape: one for all leaves takes a GPU's compiler minutes.
  """
  leaves, structure = jax.tree.flatten_with_path(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  names = [jax.tree_util.keystr(path[-1:], simple=True) for path, _ in leaves]
  made = [
    jnp.ones(leaf.shape, leaf.dtype) if name == "scale" else _draw(key, leaf)
    for name, key, (_, leaf) in zip(names, keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(structure, made)


@functools.partial(jax.jit, static_argnums=1)
def _draw(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
  if jnp.issubdtype(leaf.dtype, jnp.integer):  # codes of a quantised weight
    return jax.random.bits(key, leaf.shape, jnp.uint8).astype(leaf.dtype)
  return (0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)


def _batch(shape: Shape) -> dict[str, Any]:
  ids_BxT = jax.random.randint(
    jax.random.key(3), (shape.batch, shape.length), 4, shape.vocab, jnp.int32
  )
  return {
    "input_ids": ids_BxT,
    "attention_mask": jnp.ones_like(ids_BxT),
    "labels": MODELS[shape.model].labels(ids_BxT),
    "weights": jnp.ones(shape.batch),
  }


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A table as text: the first column left-aligned, the others right-aligned."""
  cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = [
    "  ".join(
      c.ljust(w) if i == 0 else c.rjust(w)
      for i, (c, w) in enumerate(zip(row, widths, strict=True))
    )
    for row in cells
  ]
  return "\n".join([title, *lines])


def repeat() -> str:
  """The last line of a benchmark: date, versions, processor, command to repeat it."""
  cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
  name = sys.modules["__main__"].__spec__.name.removesuffix(".__main__")
  facts = (
    f"{datetime.date.today()}",
    f"JAX {jax.__version__}",
    f"Python {platform.python_version()}",
    f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.machine()}",
  )
  return (
    f"{', '.join(facts)}. Repeat: {shlex.join(['python', '-m', name, *sys.argv[1:]])}"
  )


def _rate(step: jax.Array) -> jax.Array:
  del step
  return jnp.float32(1e-4)

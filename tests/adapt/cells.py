"""The layers of the test table: each maps (B, T, D) to (B, T, D), in each library.

Sizes are odd and all different, so that a kernel is known by its shape.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

B, T, D = 2, 5, 6
VOCAB, HIDDEN, HEADS, EXPERTS = 11, 7, 3, 4


class Dense(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(D, name="down")(jnp.tanh(nn.Dense(HIDDEN, name="up")(x)))


class DenseGeneral(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.DenseGeneral((HEADS, HIDDEN), name="up")(x)
    return nn.DenseGeneral(D, axis=(-2, -1), name="down")(jnp.tanh(y))


class Attention(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attention")(x, x)


class Einsum(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.Einsum((D, HEADS, HIDDEN), "btd,dhk->bhtk", name="up")(x)
    return nn.Einsum((HEADS, HIDDEN, D), "bhtk,hkd->btd", name="down")(jnp.tanh(y))


class EmbedAttend(nn.Module):
  """One table, looked up and used again for logits."""

  @nn.compact
  def __call__(self, x):
    embed = nn.Embed(VOCAB, D, name="embed")
    logits = embed.attend(x)
    return x + embed(jnp.argmax(jax.lax.stop_gradient(logits), -1)) + logits[..., :D]


class Conv(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.Conv(HIDDEN, (3,), kernel_dilation=2, name="up")(x)
    return nn.Conv(D, (1,), name="down")(jnp.tanh(y))


class Raw(nn.Module):
  """Parameters with no layer around them, the weight on the left, transposed."""

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.normal(0.3)
    up = self.param("up", init, (HIDDEN, D))
    down = self.param("down", init, (HIDDEN, HEADS, D // HEADS))
    y = jnp.tanh(jnp.einsum("fd,btd->btf", up, x))
    return y @ down.reshape(HIDDEN, D)


class Experts(nn.Module):
  """Experts made by vmap, each on its own inputs, summed."""

  @nn.compact
  def __call__(self, x):
    layer = nn.vmap(
      nn.Dense,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      axis_size=EXPERTS,
    )(D, name="experts")
    gates = jax.nn.softmax(x[..., :EXPERTS], -1)  # (B, T, E)
    xs = jnp.moveaxis(gates, -1, 0)[..., None] * x[None]  # (E, B, T, D)
    return layer(xs).sum(0)


LINEN = {
  "dense": Dense,
  "dense_general": DenseGeneral,
  "attention": Attention,
  "einsum": Einsum,
  "embed_attend": EmbedAttend,
  "conv": Conv,
  "raw": Raw,
  "experts": Experts,
}

# What each cell's targets are called, without the module that holds the cell.
TARGETS = {
  "dense": ["up/kernel", "down/kernel"],
  "dense_general": ["up/kernel", "down/kernel"],
  "attention": ["query/kernel", "key/kernel", "value/kernel", "out/kernel"],
  "einsum": ["up/kernel", "down/kernel"],
  "embed_attend": ["embed/embedding"],
  "conv": ["up/kernel", "down/kernel"],
  "raw": ["up", "down"],
  "experts": ["experts/kernel"],
}


class Step(nn.Module):
  """A cell behind a residual and a norm, in the form that nn.scan asks for."""

  cell: str

  @nn.compact
  def __call__(self, x, _=None):
    return x + LINEN[self.cell](name="cell")(nn.LayerNorm(name="norm")(x)), None


class Stack(nn.Module):
  cell: str
  mode: str
  depth: int = 3

  @nn.compact
  def __call__(self, x):
    step = nn.remat(Step, prevent_cse=False) if "remat" in self.mode else Step
    if "scan" in self.mode:
      layers = nn.scan(
        step,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=self.depth,
      )
      x, _ = layers(self.cell, name="layers")(x, None)
    else:
      for i in range(self.depth):
        x, _ = step(self.cell, name=f"layer_{i}")(x)
    return nn.Dense(2, name="head")(x)


def linen(cell: str, mode: str):
  """(apply_fn, params, x) of a Linen stack."""
  x = jax.random.normal(jax.random.key(1), (B, T, D))
  model = Stack(cell, mode)
  params = model.init(jax.random.key(0), x)["params"]
  return lambda p, x: model.apply({"params": p}, x), params, x


class NnxDense(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(D, HIDDEN, rngs=rngs)
    self.down = nnx.Linear(HIDDEN, D, rngs=rngs)

  def __call__(self, x):
    return self.down(jnp.tanh(self.up(x)))


class NnxDenseGeneral(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.LinearGeneral(D, (HEADS, HIDDEN), rngs=rngs)
    self.down = nnx.LinearGeneral((HEADS, HIDDEN), D, axis=(-2, -1), rngs=rngs)

  def __call__(self, x):
    return self.down(jnp.tanh(self.up(x)))


class NnxAttention(nnx.Module):
  def __init__(self, rngs):
    self.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)

  def __call__(self, x):
    return self.attention(x)


class NnxEinsum(nnx.Module):
  def __init__(self, rngs):
    up, down = (D, HEADS, HIDDEN), (HEADS, HIDDEN, D)
    self.up = nnx.Einsum("btd,dhk->bhtk", up, rngs=rngs)
    self.down = nnx.Einsum("bhtk,hkd->btd", down, rngs=rngs)

  def __call__(self, x):
    return self.down(jnp.tanh(self.up(x)))


class NnxEmbedAttend(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(VOCAB, D, rngs=rngs)

  def __call__(self, x):
    logits = self.embed.attend(x)
    ids = jnp.argmax(jax.lax.stop_gradient(logits), -1)
    return x + self.embed(ids) + logits[..., :D]


class NnxConv(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Conv(D, HIDDEN, (3,), kernel_dilation=2, rngs=rngs)
    self.down = nnx.Conv(HIDDEN, D, (1,), rngs=rngs)

  def __call__(self, x):
    return self.down(jnp.tanh(self.up(x)))


class NnxRaw(nnx.Module):
  def __init__(self, rngs):
    shape = (HIDDEN, HEADS, D // HEADS)
    self.up = nnx.Param(0.3 * jax.random.normal(rngs.params(), (HIDDEN, D)))
    self.down = nnx.Param(0.3 * jax.random.normal(rngs.params(), shape))

  def __call__(self, x):
    y = jnp.tanh(jnp.einsum("fd,btd->btf", self.up[...], x))
    return y @ self.down[...].reshape(HIDDEN, D)


class NnxExperts(nnx.Module):
  def __init__(self, rngs):
    @nnx.split_rngs(splits=EXPERTS)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
      return nnx.Linear(D, D, rngs=rngs)

    self.experts = make(rngs)

  def __call__(self, x):
    gates = jax.nn.softmax(x[..., :EXPERTS], -1)
    xs = jnp.moveaxis(gates, -1, 0)[..., None] * x[None]
    return nnx.vmap(lambda layer, x: layer(x))(self.experts, xs).sum(0)


NNX = {
  "dense": NnxDense,
  "dense_general": NnxDenseGeneral,
  "attention": NnxAttention,
  "einsum": NnxEinsum,
  "embed_attend": NnxEmbedAttend,
  "conv": NnxConv,
  "raw": NnxRaw,
  "experts": NnxExperts,
}


class NnxStep(nnx.Module):
  def __init__(self, cell, rngs):
    self.norm = nnx.LayerNorm(D, rngs=rngs)
    self.cell = NNX[cell](rngs)

  def __call__(self, x):
    return x + self.cell(self.norm(x))


class NnxStack(nnx.Module):
  def __init__(self, cell, mode, rngs, depth=3):
    self.mode = mode
    if "scan" in mode:

      @nnx.split_rngs(splits=depth)
      @nnx.vmap(in_axes=0, out_axes=0)
      def make(rngs):
        return NnxStep(cell, rngs)

      self.layers = make(rngs)
    else:
      self.layers = nnx.List([NnxStep(cell, rngs) for _ in range(depth)])
    self.head = nnx.Linear(D, 2, rngs=rngs)

  def __call__(self, x):
    def step(layer, x):
      return layer(x)

    if "remat" in self.mode:
      step = nnx.remat(step, prevent_cse=False)
    if "scan" in self.mode:
      x = nnx.scan(step, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)
    else:
      for layer in self.layers:
        x = step(layer, x)
    return self.head(x)


def nnx_stack(cell: str, mode: str):
  """(apply_fn, params, x) of an NNX stack, params an nnx.State."""
  x = jax.random.normal(jax.random.key(1), (B, T, D))
  model = NnxStack(cell, mode, nnx.Rngs(0))
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  def apply_fn(p, x):
    return nnx.merge(graph, p, rest)(x)

  return apply_fn, params, x


class EqxDense(eqx.Module):
  up: eqx.nn.Linear
  down: eqx.nn.Linear

  def __init__(self, key):
    up, down = jax.random.split(key)
    self.up, self.down = (
      eqx.nn.Linear(D, HIDDEN, key=up),
      eqx.nn.Linear(HIDDEN, D, key=down),
    )

  def __call__(self, x_TxD):
    return jax.vmap(lambda x: self.down(jnp.tanh(self.up(x))))(x_TxD)


class EqxAttention(eqx.Module):
  attention: eqx.nn.MultiheadAttention

  def __init__(self, key):
    self.attention = eqx.nn.MultiheadAttention(HEADS, D, key=key)

  def __call__(self, x_TxD):
    return self.attention(x_TxD, x_TxD, x_TxD)


class EqxNamed(eqx.Module):
  """Submodules called as attention's are, among them `value`."""

  query: eqx.nn.Linear
  value: eqx.nn.Linear

  def __init__(self, key):
    query, value = jax.random.split(key)
    self.query = eqx.nn.Linear(D, D, key=query)
    self.value = eqx.nn.Linear(D, D, key=value)

  def __call__(self, x_TxD):
    return jax.vmap(lambda x: self.query(x) * jnp.tanh(self.value(x)))(x_TxD)


class EqxConv(eqx.Module):
  up: eqx.nn.Conv1d
  down: eqx.nn.Conv1d

  def __init__(self, key):
    up, down = jax.random.split(key)
    self.up = eqx.nn.Conv1d(D, HIDDEN, 3, padding="SAME", dilation=2, key=up)
    self.down = eqx.nn.Conv1d(HIDDEN, D, 1, key=down)

  def __call__(self, x_TxD):
    return self.down(jnp.tanh(self.up(x_TxD.T))).T


class EqxEmbedAttend(eqx.Module):
  embed: eqx.nn.Embedding

  def __init__(self, key):
    self.embed = eqx.nn.Embedding(VOCAB, D, key=key)

  def __call__(self, x_TxD):
    logits = x_TxD @ self.embed.weight.T
    ids = jnp.argmax(jax.lax.stop_gradient(logits), -1)
    return x_TxD + self.embed.weight[ids] + logits[..., :D]


EQUINOX = {
  "dense": (EqxDense, ["up/weight", "down/weight"]),
  "attention": (
    EqxAttention,
    [f"{name}_proj/weight" for name in ("query", "key", "value", "output")],
  ),
  "named_value": (EqxNamed, ["query/weight", "value/weight"]),
  "conv": (EqxConv, ["up/weight", "down/weight"]),
  "embed_attend": (EqxEmbedAttend, ["embed/weight"]),
}


class EqxStep(eqx.Module):
  norm: eqx.nn.LayerNorm
  cell: eqx.Module

  def __init__(self, cell, key):
    self.norm, self.cell = eqx.nn.LayerNorm(D), EQUINOX[cell][0](key)

  def __call__(self, x_TxD):
    return x_TxD + self.cell(jax.vmap(self.norm)(x_TxD))


def equinox(cell: str, mode: str, depth=3):
  """(apply_fn, params, x) of an Equinox stack; params are the module's arrays."""
  x = jax.random.normal(jax.random.key(1), (B, T, D))
  keys = jax.random.split(jax.random.key(0), depth)
  make = lambda key: EqxStep(cell, key)
  layers = eqx.filter_vmap(make)(keys) if "scan" in mode else [*map(make, keys)]
  params, static = eqx.partition(layers, eqx.is_inexact_array)

  def apply_fn(p, x):
    layers = eqx.combine(p, static)
    step = lambda layer, x: layer(x)
    if "remat" in mode:
      step = eqx.filter_checkpoint(step)

    def one(x_TxD):
      if "scan" not in mode:
        for layer in layers:
          x_TxD = step(layer, x_TxD)
        return x_TxD
      arrays, rest = eqx.partition(layers, eqx.is_array)
      run = lambda x, layer: (step(eqx.combine(layer, rest), x), None)
      return jax.lax.scan(run, x_TxD, arrays)[0]

    return jax.vmap(one)(x)

  return apply_fn, params, x


def _haiku_dense(x):
  return hk.Linear(D, name="down")(jnp.tanh(hk.Linear(HIDDEN, name="up")(x)))


def _haiku_attention(x):
  attention = hk.MultiHeadAttention(
    HEADS, HIDDEN, w_init=hk.initializers.VarianceScaling(), model_size=D
  )
  return attention(x, x, x)


def _haiku_conv(x):
  y = jnp.tanh(hk.Conv1D(HIDDEN, 3, rate=2, name="up")(x))
  return hk.Conv1D(D, 1, name="down")(y)


def _haiku_embed_attend(x):
  embed = hk.Embed(VOCAB, D, name="embed")
  logits = x @ embed.embeddings.T
  ids = jnp.argmax(jax.lax.stop_gradient(logits), -1)
  return x + embed(ids) + logits[..., :D]


HAIKU = {
  "dense": (_haiku_dense, ["up/w", "down/w"]),
  "attention": (_haiku_attention, ["query/w", "key/w", "value/w", "linear/w"]),
  "conv": (_haiku_conv, ["up/w", "down/w"]),
  "embed_attend": (_haiku_embed_attend, ["embed/embeddings"]),
}


def haiku(cell: str, mode: str, depth=3):
  """(apply_fn, params, x) of a Haiku stack, transformed to a function."""
  x = jax.random.normal(jax.random.key(1), (B, T, D))

  def step(x):
    norm = hk.LayerNorm(-1, create_scale=True, create_offset=True, name="norm")
    return x + HAIKU[cell][0](norm(x))

  def forward(x):
    run = hk.remat(step) if "remat" in mode else step
    if "scan" in mode:
      return hk.experimental.layer_stack(depth)(run)(x)
    for i in range(depth):
      with hk.name_scope(f"layer_{i}"):
        x = run(x)
    return x

  model = hk.without_apply_rng(hk.transform(forward))
  return model.apply, model.init(jax.random.key(0), x), x

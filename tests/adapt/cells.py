"""The layers of the test table: each maps (B, T, D) to (B, T, D), in Linen and in NNX.

Sizes are odd and all different, so that a kernel is known by its shape.
"""

import flax.linen as nn
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

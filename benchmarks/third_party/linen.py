"""Linen modules: Flax's own layers, and libraries built on them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.third_party.check import Model, random_like

X = jax.random.normal(jax.random.key(0), (2, 5, 6))
IDS = jax.random.randint(jax.random.key(0), (2, 9), 0, 97)


def _model(module, *inputs, **kwargs) -> Model:
  """A module whose collections but the parameters stay as they are."""
  init = lambda key: module.init({"params": key, "dropout": key}, *inputs, **kwargs)
  variables = random_like(jax.eval_shape(init, jax.random.key(0)))
  params = variables.pop("params")

  def fn(params, state, *inputs):
    return module.apply({"params": params, **state}, *inputs, **kwargs)

  return Model(fn, params, (variables, *inputs))


def lstm():
  return _model(nn.RNN(nn.OptimizedLSTMCell(7)), X)


def gru_bidirectional():
  return _model(nn.Bidirectional(nn.RNN(nn.GRUCell(7)), nn.RNN(nn.GRUCell(7))), X)


def conv_lstm():
  cell = nn.ConvLSTMCell(features=3, kernel_size=(3, 3))
  return _model(nn.RNN(cell), jax.random.normal(jax.random.key(0), (2, 3, 6, 6, 2)))


def attention_cached():
  module = nn.MultiHeadDotProductAttention(2, qkv_features=8, decode=True)
  variables = module.init(jax.random.key(0), X)  # a cache of five places

  def fn(params, cache, x):
    state = {"params": params, "cache": cache}
    return module.apply(state, x, mutable=["cache"])

  return Model(fn, variables["params"], (variables["cache"], X[:, :1]))


def weight_norm():
  return _model(
    nn.Sequential([nn.WeightNorm(nn.Dense(7)), nn.Dense(7), nn.Dense(3)]), X
  )


def spectral_norm():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.SpectralNorm(nn.Dense(7))(x, update_stats=False)
      return nn.Dense(3)(jnp.tanh(x))

  return _model(Net(), X)


def flaxmodels_resnet():
  from flaxmodels import ResNet18

  module = ResNet18(output="logits", pretrained=None, normalize=False, num_classes=5)
  images = jax.random.normal(jax.random.key(0), (1, 32, 32, 3))
  return _model(module, images, train=False)


def flaxmodels_stylegan():
  from flaxmodels.stylegan2.generator import MappingNetwork

  module = MappingNetwork(z_dim=8, w_dim=8, embed_features=8, layer_features=8)
  return _model(module, jax.random.normal(jax.random.key(0), (2, 8)), train=False)


def nano_moe():
  from nano_moe.config import NanoMoEConfig
  from nano_moe.model import NanoMoE

  config = NanoMoEConfig(97, 2, 4, 16, 24, block_size=9, dropout_rate=0.0)
  return _model(NanoMoE(config), IDS)


def e3nn_linear():
  import e3nn_jax as e3nn

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = e3nn.IrrepsArray("4x0e + 2x1o", x)
      x = e3nn.flax.Linear("6x0e + 3x1o")(x)
      x = e3nn.tensor_square(e3nn.norm_activation(x, [jax.nn.silu, None]))
      return e3nn.flax.Linear("2x0e + 1x1o")(x).array

  return _model(Net(), jax.random.normal(jax.random.key(0), (3, 10)))


MODELS = {
  build.__name__: build
  for build in (
    lstm, gru_bidirectional, conv_lstm, attention_cached, weight_norm, spectral_norm,
    flaxmodels_resnet, flaxmodels_stylegan, nano_moe, e3nn_linear,
  )
}  # fmt: skip

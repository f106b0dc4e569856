"""NNX modules: Flax's own layers, and libraries built on them."""

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.third_party.check import Model

X = jax.random.normal(jax.random.key(0), (2, 5, 6))
IDS = jax.random.randint(jax.random.key(0), (2, 9), 0, 97)


def _model(module, *inputs, call=lambda module, *xs: module(*xs)) -> Model:
  module.eval()
  graph, params, rest = nnx.split(module, nnx.Param, ...)

  def fn(params, *inputs):
    return call(nnx.merge(graph, params, rest), *inputs)

  return Model(fn, params, inputs)


def lstm():
  module = nnx.RNN(nnx.OptimizedLSTMCell(6, 7, rngs=nnx.Rngs(0)))
  return _model(module, X, call=lambda m, x: m(x, rngs=nnx.Rngs(0)))


def attention():
  rngs = nnx.Rngs(0)
  attention = nnx.MultiHeadAttention(2, 6, 8, decode=False, rngs=rngs)
  return _model(nnx.Sequential(attention, nnx.Linear(6, 3, rngs=rngs)), X)


def lora_own():
  rngs = nnx.Rngs(0)
  layers = nnx.LoRALinear(6, 7, lora_rank=2, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)
  return _model(nnx.Sequential(*layers), X)


def mamba2():
  from mamba2_jax import modeling

  module = modeling.Mamba2ForCausalLM(modeling.Mamba2Config.tiny(), rngs=nnx.Rngs(0))
  return _model(module, IDS, call=lambda m, ids: m(ids)["logits"])


def mamba3():
  from mamba3_jax import modeling

  module = modeling.Mamba3ForCausalLM(modeling.Mamba3Config.tiny(), rngs=nnx.Rngs(0))
  return _model(module, IDS, call=lambda m, ids: m(ids)["logits"])


def mamba3_mimo():
  from mamba3_jax import modeling

  config = modeling.Mamba3Config.tiny_mimo()
  module = modeling.Mamba3ForCausalLM(config, rngs=nnx.Rngs(0))
  return _model(module, IDS, call=lambda m, ids: m(ids)["logits"])


def jaxkan_chebyshev():
  from jaxkan.models.KAN import KAN

  settings = {"D": 4, "flavor": "exact"}
  return _model(KAN([6, 7, 3], "chebyshev", settings), X[0])


def jaxkan_spline():
  from jaxkan.models.KAN import KAN

  return _model(KAN([6, 7, 3], "spline", {"k": 3, "G": 4}), X[0])


def jaxkan_actnet():
  from jaxkan.models.ActNet import ActNet

  return _model(ActNet([6, 7, 3]), X[0])


def jraphx_gat():
  from jraphx.nn.models import GAT

  edges = jnp.array([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])
  module = GAT(6, 8, 2, 3, heads=2, rngs=nnx.Rngs(0))
  return _model(module, X[0], call=lambda m, x: m(x, edges))


def jraphx_gin():
  from jraphx.nn.models import GIN

  edges = jnp.array([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])
  return _model(GIN(6, 8, 2, 3, rngs=nnx.Rngs(0)), X[0], call=lambda m, x: m(x, edges))


def attnax_decoder():
  import attnax

  config = attnax.TransformerConfig(
    vocab_size=97, d_model=16, num_heads=2, num_layers=2, d_ff=24, pos_emb_type="rope"
  )
  return _model(attnax.TransformerDecoder(nnx.Rngs(0), config), IDS)


MODELS = {
  build.__name__: build
  for build in (
    lstm, attention, lora_own, mamba2,
    mamba3, mamba3_mimo, jaxkan_chebyshev, jaxkan_spline, jaxkan_actnet, jraphx_gat,
    jraphx_gin, attnax_decoder,
  )
}  # fmt: skip

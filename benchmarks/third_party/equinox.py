"""Equinox modules: Equinox's own layers, and libraries built on them."""

import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks.third_party.check import Model

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 5, 6))
IDS = jax.random.randint(KEY, (2, 9), 0, 97)
IMAGES = jax.random.normal(KEY, (2, 3, 32, 32))


def _model(module, inputs, call=lambda module, x: module(x)) -> Model:
  """A module of one example, under vmap."""
  module = eqx.nn.inference_mode(module)

  def fn(module, inputs):
    return jax.vmap(lambda x: call(module, x))(inputs)

  return Model(fn, module, (inputs,))


def mlp():
  return _model(eqx.nn.MLP(6, 3, 7, 2, key=KEY), X[0])


def lstm():
  cell = eqx.nn.LSTMCell(6, 7, key=KEY)

  def run(cell, xs):
    step = lambda state, x: (cell(x, state), None)
    return jax.lax.scan(step, (jnp.zeros(7), jnp.zeros(7)), xs)[0]

  return _model(cell, X, run)


def attention():
  module = eqx.nn.MultiheadAttention(2, 6, key=KEY)
  return _model(module, X, lambda m, x: m(x, x, x))


def conv_transpose():
  return _model(
    eqx.nn.Sequential(
      [
        eqx.nn.Conv2d(3, 4, 3, groups=1, key=KEY),
        eqx.nn.Lambda(jnp.tanh),
        eqx.nn.ConvTranspose2d(4, 2, 3, stride=2, key=KEY),
      ]
    ),
    IMAGES[:, :, :8, :8],
  )


def weight_norm():
  layers = [eqx.nn.WeightNorm(eqx.nn.Linear(6, 7, key=KEY)), eqx.nn.Lambda(jnp.tanh)]
  module = eqx.nn.Sequential([*layers, eqx.nn.Linear(7, 3, key=KEY)])
  return _model(module, X[0])


def equimo_vit():
  from equimo.models.vit import VisionTransformer

  module = VisionTransformer(
    32, 3, 16, 16, 2, [2], key=KEY, num_classes=5, reg_tokens=1
  )
  return _model(module, IMAGES)


def equimo_convnext():
  from equimo.models.convnext import ConvNeXt

  module = ConvNeXt(
    3, depths=[1, 1, 1, 1], dims=[4, 6, 8, 10], num_classes=5, key=KEY,
    layer_scale_init_value=1.0,
  )  # fmt: skip
  return _model(module, IMAGES)


def equimo_mlla():
  from equimo.models.mlla import Mlla

  module = Mlla(32, 3, dim=8, depths=[1, 1], num_heads=[2, 2], num_classes=5, key=KEY)
  return _model(module, IMAGES)


def equimo_vssd():
  from equimo.models.vssd import Vssd

  module = Vssd(
    32, 3, dim=8, d_state=4, depths=[1, 1], num_heads=[2, 2], num_classes=5, key=KEY,
    attentions_layers=("mamba2mixer", "attention"),
  )  # fmt: skip
  return _model(module, IMAGES)


def jaxonmodels_mamba():
  from jaxonmodels.models.mamba import Mamba

  module = Mamba(8, 97, 2, d_state=4, key=KEY)
  return _model(module, IDS, lambda m, ids: m(ids))


def jaxonmodels_vit():
  from jaxonmodels.models.vit import VisionTransformer

  return _model(VisionTransformer(32, 16, 16, 2, 2, 5, key=KEY), IMAGES)


def flowjax_coupling():
  from flowjax.distributions import Normal
  from flowjax.flows import coupling_flow

  flow = coupling_flow(KEY, base_dist=Normal(jnp.zeros(6)), flow_layers=2, nn_width=8)
  return Model(lambda flow, x: flow.log_prob(x), flow, (X[0],))


def flowjax_masked():
  from flowjax.distributions import Normal
  from flowjax.flows import masked_autoregressive_flow

  flow = masked_autoregressive_flow(
    KEY, base_dist=Normal(jnp.zeros(6)), flow_layers=2, nn_width=8
  )
  return Model(lambda flow, x: flow.log_prob(x), flow, (X[0],))


def diffrax_ode():
  import diffrax

  def solve(mlp, y0):
    term = diffrax.ODETerm(lambda t, y, args: mlp(y))
    solution = diffrax.diffeqsolve(
      term, diffrax.Tsit5(), 0.0, 1.0, 0.2, y0,
      saveat=diffrax.SaveAt(ts=jnp.linspace(0, 1, 3)),
    )  # fmt: skip
    return solution.ys

  return _model(eqx.nn.MLP(6, 6, 7, 2, activation=jnp.tanh, key=KEY), X[0], solve)


MODELS = {
  build.__name__: build
  for build in (
    mlp, lstm, attention, conv_transpose, weight_norm, equimo_vit, equimo_convnext,
    equimo_mlla, equimo_vssd, jaxonmodels_mamba, jaxonmodels_vit,
    flowjax_coupling, flowjax_masked, diffrax_ode, )
}  # fmt: skip

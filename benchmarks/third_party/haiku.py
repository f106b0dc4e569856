"""Haiku functions: Haiku's own nets, and libraries built on them."""

import haiku as hk
import jax
import jax.numpy as jnp

from benchmarks.third_party.check import Model, random_like

X = jax.random.normal(jax.random.key(0), (2, 5, 6))
IMAGES = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))


def _model(function, *inputs) -> Model:
  net = hk.without_apply_rng(hk.transform_with_state(function))
  shapes, states = jax.eval_shape(net.init, jax.random.key(0), *inputs)

  def fn(params, state, *inputs):
    return net.apply(params, state, *inputs)[0]

  return Model(fn, random_like(shapes), (random_like(states), *inputs))


def mlp():
  return _model(lambda x: hk.nets.MLP([7, 3])(x), X)


def lstm():
  def run(xs):
    core = hk.LSTM(7)
    return hk.dynamic_unroll(core, xs, core.initial_state(5))[0]

  return _model(run, X)


def attention():
  return _model(lambda x: hk.MultiHeadAttention(2, 4, w_init=jnp.zeros)(x, x, x), X)


def resnet():
  def run(x, is_training):
    net = hk.nets.ResNet([1, 1, 1, 1], 5, channels_per_group=(8, 8, 8, 8))
    return net(x, is_training)

  net = hk.without_apply_rng(hk.transform_with_state(run))
  init = lambda key: net.init(key, IMAGES, is_training=True)
  params, state = map(random_like, jax.eval_shape(init, jax.random.key(0)))
  fn = lambda params, state, x: net.apply(params, state, x, is_training=False)[0]
  return Model(fn, params, (state, IMAGES))


def mobilenet():
  net = lambda x: hk.nets.MobileNetV1((1, 2), (8, 12), num_classes=5, use_bn=False)(
    x, is_training=False
  )
  return _model(net, IMAGES)


def vqvae():
  def run(x):
    return hk.nets.VectorQuantizer(6, 7, 0.25)(hk.Linear(6)(x), is_training=False)

  return _model(lambda x: hk.Linear(3)(run(x)["quantize"]), X)


def jraph_network():
  import jraph

  def run(nodes, edges):
    graph = jraph.GraphsTuple(
      nodes=nodes, edges=edges, senders=jnp.array([0, 1, 2]),
      receivers=jnp.array([1, 2, 0]), n_node=jnp.array([5]), n_edge=jnp.array([3]),
      globals=jnp.ones((1, 2)),
    )  # fmt: skip
    update = lambda size: jraph.concatenated_args(lambda x: hk.nets.MLP([7, size])(x))
    return jraph.GraphNetwork(update(4), update(6), update(3))(graph).globals

  return _model(run, X[0], X[1, :3])


def jraph_convolution():
  import jraph

  def run(nodes):
    ids = jnp.array([0, 1, 2]), jnp.array([1, 2, 0])
    sizes = jnp.array([5]), jnp.array([3])
    graph = jraph.GraphsTuple(nodes, None, *ids, None, *sizes)
    graph = jraph.GraphConvolution(hk.Linear(7), add_self_edges=True)(graph)
    return jraph.GraphConvolution(hk.Linear(3))(graph).nodes

  return _model(run, X[0])


def e3nn_convolution():
  import e3nn_jax as e3nn

  def run(x):
    x = e3nn.IrrepsArray("4x0e + 2x1o", x)
    x = e3nn.haiku.Linear("6x0e + 3x1o")(x)
    x = e3nn.haiku.FullyConnectedTensorProduct("2x0e + 2x1o")(x, x)
    return e3nn.haiku.Linear("2x0e")(x).array

  return _model(run, jax.random.normal(jax.random.key(0), (3, 10)))


def distrax_flow():
  import distrax

  def run(x):
    def scale_and_shift(params):
      return distrax.ScalarAffine(params[..., :6], log_scale=params[..., 6:])

    couple = lambda: distrax.MaskedCoupling(
      jnp.arange(6) % 2 == 0, lambda x: hk.nets.MLP([7, 12])(x), scale_and_shift
    )
    base = distrax.MultivariateNormalDiag(jnp.zeros(6), jnp.ones(6))
    return distrax.Transformed(base, distrax.Chain([couple(), couple()])).log_prob(x)

  return _model(run, X)


MODELS = {
  build.__name__: build
  for build in (
    mlp, lstm, attention, resnet, mobilenet, vqvae, jraph_network, jraph_convolution,
    e3nn_convolution, distrax_flow,
  )
}  # fmt: skip

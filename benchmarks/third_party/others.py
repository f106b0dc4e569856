"""Models of libraries with modules of their own: Keras, Penzai, Inox."""

import os

import jax
import jax.numpy as jnp

from benchmarks.third_party.check import Model

X = jax.random.normal(jax.random.key(0), (2, 5, 6))
IDS = jax.random.randint(jax.random.key(0), (2, 9), 0, 97)


def _keras(build, inputs) -> Model:
  os.environ["KERAS_BACKEND"] = "jax"
  import keras

  model = build(keras)
  model(inputs)
  params = [v.value for v in model.trainable_variables]
  frozen = [v.value for v in model.non_trainable_variables]

  def fn(params, x):
    return model.stateless_call(params, frozen, x, training=False)[0]

  return Model(fn, params, (inputs,))


def keras_transformer():
  def build(keras):
    x = inputs = keras.Input((5, 6))
    attended = keras.layers.MultiHeadAttention(2, 4)(x, x)
    x = keras.layers.LayerNormalization()(keras.layers.Add()([x, attended]))
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GRU(7)(x)))

  return _keras(build, X)


def keras_separable():
  def build(keras):
    layers = keras.layers
    return keras.Sequential(
      [layers.SeparableConv2D(8, 3), layers.Conv2D(4, 3, activation="tanh"),
       layers.Conv2DTranspose(4, 3), layers.GlobalAveragePooling2D(), layers.Dense(3)]
    )  # fmt: skip

  return _keras(build, jax.random.normal(jax.random.key(0), (2, 9, 9, 3)))


def penzai_llama():
  from penzai import pz
  from penzai.models.transformer.variants import llamalike_common as llama

  config = llama.LlamalikeTransformerConfig(
    num_kv_heads=2, query_head_multiplier=2, embedding_dim=16, projection_dim=4,
    mlp_hidden_dim=24, num_decoder_blocks=2, vocab_size=97, mlp_variant="swiglu",
    tie_embedder_and_logits=False, rope_wavelength=1e4, rms_norm_eps=1e-5,
    parameter_dtype=jnp.float32, activation_dtype=jnp.float32,
  )  # fmt: skip
  model = llama.build_llamalike_transformer(config, init_base_rng=jax.random.key(0))
  model, variables = pz.unbind_variables(model, freeze=True)

  def fn(variables, ids):
    bound = pz.bind_variables(model, variables)
    tokens = pz.nx.wrap(ids).tag("batch", "seq")
    return bound(tokens, token_positions=pz.nx.arange("seq", 9)).data_array

  return Model(fn, variables, (IDS,))


def inox_gru():
  import inox.nn as inn

  key = jax.random.key(0)
  model = inn.Recurrent(inn.GRUCell(6, 7, key=key))
  static, params, others = model.partition(inn.Parameter)

  def fn(params, xs):
    return jax.vmap(static(params, others))(xs)

  return Model(fn, params, (X,))


MODELS = {
  build.__name__: build
  for build in (
    keras_transformer, keras_separable, penzai_llama, inox_gru,
  )
}  # fmt: skip

"""Programs of StableHLO, of every family; tests of the merge command run some."""

import dataclasses

import flatbuffers  # noqa: F401
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from lorax_flax.errors import LoraxError
from lorax_flax.models import registry, stablehlo

LAYERS = dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), 1)


def _program(model):
  return stablehlo.of_model(model, registry.abstract_params(model))


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_a_program_takes_any_batch_and_length(family):
  model = registry.outline({"model_type": family, **LAYERS})
  program = _program(model)
  again = export.deserialize(bytearray(program.serialize()))
  assert again.platforms == ("cpu", "cuda", "tpu")
  (weights, inputs), _ = jax.tree.unflatten(again.in_tree, again.in_avals)
  assert set(model.family.inputs(model.config)) <= set(inputs)
  for batch, length in ((1, 1), (3, 7)):
    sizes = {"batch": batch, "length": length, "decoder_length": length + 2}

    def struct(like, sizes=sizes):
      shape = [n if isinstance(n, int) else sizes[str(n)] for n in like.shape]
      return jax.ShapeDtypeStruct(shape, like.dtype)

    fed = {name: struct(like) for name, like in inputs.items()}
    expected = jax.eval_shape(
      lambda params, inputs: model.module.apply({"params": params}, **inputs),
      registry.abstract_params(model),
      fed,
    )
    got = jax.eval_shape(again.call, weights, fed)
    assert (got.shape, got.dtype) == (expected.shape, jnp.float32)


def test_a_text_longer_than_the_models_is_refused():
  model = registry.outline({"model_type": "bert", **LAYERS})
  program = _program(model)
  (weights, _), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
  ids = jax.ShapeDtypeStruct((2, 513), jnp.int32)
  inputs = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ids)
  with pytest.raises(ValueError, match="512"):
    jax.eval_shape(program.call, weights, inputs)


def test_a_quantised_weight_is_a_dense_argument():
  model = registry.outline({"model_type": "llama", **LAYERS})
  program = stablehlo.of_model(model, registry.abstract_params(model, quant="nf4"))
  assert str(program.in_avals) == str(_program(model).in_avals)


class _AtTrace(nn.Module):
  @nn.compact
  def __call__(self, input_ids, attention_mask):
    return input_ids + np.arange(input_ids.shape[1])


def test_what_cannot_be_exported_is_named():
  model = registry.outline({"model_type": "llama", **LAYERS})
  model = dataclasses.replace(model, module=_AtTrace())
  with pytest.raises(LoraxError, match="a llama can't be exported as StableHLO: "):
    stablehlo.of_model(model, {})

"""A model as a StableHLO program, which runs in a process that has JAX alone."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

from lorax_flax.adapt.paths import flatten, map_with_path
from lorax_flax.errors import prefixed
from lorax_flax.models.registry import Outline

PLATFORMS = ("cpu", "cuda", "tpu")
# Attention asks for the platform that it is traced on: its kernels are of one each.
_ANY = AbstractMesh((), (), abstract_device=AbstractDevice("cpu", None, "cpu"))
# What operations raise that have no form on a platform, or need a size as a number.
_REASONS = (
  NotImplementedError,
  TypeError,
  ValueError,
  jax.errors.InconclusiveDimensionOperation,
)


def of_model(model: Outline, params: Any) -> export.Exported:
  """Exports (weights by path, inputs by name) -> logits, as the module computes them.

  The program takes any batch, texts of any length up to the model's, on `PLATFORMS`.
  All of its arguments are kept, in the order of their names, weights first.

  Args:
    params: the model's tree, of which only shapes and dtypes are read. Quantised
      weights are dense arguments.

  Raises:
    LoraxError: a model with an operation that can't be exported; it says which.
  """

  def logits(weights: Any, inputs: Any) -> Any:
    tree = map_with_path(lambda path, _: weights[path], params)
    return model.module.apply({"params": tree}, **inputs)

  weights = {
    path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    for path, leaf in flatten(params).items()
  }
  program = jax.jit(logits, keep_unused=True)
  name = model.hf_config["model_type"]
  refusing = prefixed(f"a {name} can't be exported as StableHLO", *_REASONS)
  with refusing, jax.sharding.use_abstract_mesh(_ANY):
    return export.export(program, platforms=PLATFORMS)(weights, inputs(model))


def inputs(model: Outline) -> dict[str, jax.ShapeDtypeStruct]:
  """The program's inputs by name, with the sizes "batch", "length" and
  "decoder_length", that of a decoder beside an encoder, as variables."""
  found = dict(model.family.inputs(model.config))
  if model.token_types:
    found["token_type_ids"] = found["input_ids"]
  sizes = {name: _sizes(name, like) for name, like in found.items()}
  variables = {
    size for each in sizes.values() for size in each if isinstance(size, str)
  }
  bounds = [f"{name} >= 1" for name in variables]
  bounds += [f"{n} <= {model.max_length}" for n in variables if n.endswith("length")]
  scope = export.SymbolicScope(bounds)

  def struct(name: str, like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    text = ", ".join(map(str, sizes[name]))
    return jax.ShapeDtypeStruct(export.symbolic_shape(text, scope=scope), like.dtype)

  return {name: struct(name, like) for name, like in found.items()}


def _sizes(name: str, like: jax.ShapeDtypeStruct) -> tuple[int | str, ...]:
  if jnp.issubdtype(like.dtype, jnp.floating):
    return ("batch", *like.shape[1:])
  return "batch", f"{'decoder_' if name.startswith('decoder_') else ''}length"

"""The model of a run as the training step calls it: with its delta, and dropout."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

import lorax_flax as lx
from lorax_flax.adapt.transform import Adapted
from lorax_flax.errors import LoraxError
from lorax_flax.jobs.settings import ModelSettings, Settings
from lorax_flax.models.registry import Outline
from lorax_flax.train.step import Forward


def adapt(model: Outline, wanted: Settings) -> tuple[Adapted, Forward]:
  """The transform of the model, and what the training step calls."""
  lora = lx.adapt(_apply_fn(with_dropout(model, wanted.model)), wanted.lora)

  def forward(params, adapter, batch, key):
    keys = (None, None) if key is None else jax.random.split(key)
    return lora.apply(params, adapter, batch, keys[0], dropout_key=keys[1])

  return lora, forward


def with_dropout(model: Outline, wanted: ModelSettings) -> Any:
  """The module with other rates than its config.json has, where they are given."""
  family = model.family
  rates: dict[str, float] = {}
  for option, fields, rate in (
    ("dropout", family.dropout, wanted.dropout),
    ("head_dropout", family.head_dropout, wanted.head_dropout),
  ):
    if rate is not None and not fields:
      name = model.hf_config["model_type"]
      raise LoraxError(f"model.{option} is {rate}, and a {name} has no such dropout")
    if rate is not None:
      rates |= dict.fromkeys(fields, rate)
  return model.module.clone(config=dataclasses.replace(model.config, **rates))


def _apply_fn(module: Any) -> Callable[..., jax.Array]:
  def apply_fn(params, batch, dropout_key=None):
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return module.apply(
      {"params": params}, **batch, deterministic=dropout_key is None, rngs=rngs
    )

  return apply_fn

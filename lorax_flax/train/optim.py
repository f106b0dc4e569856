"""Optimisers over the trained leaves, and their learning rates."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorax_flax.adapt.paths import map_with_path
from lorax_flax.errors import LoraxError
from lorax_flax.methods.delta import Delta
from lorax_flax.train.optimizers import OPTIMIZERS, is_other_factor, of_leaves

PyTree = Any
Schedule = Callable[[jax.Array], jax.Array]


def _constant(progress: jax.Array) -> jax.Array:
  return jnp.ones_like(progress)


def _linear(progress: jax.Array) -> jax.Array:
  return jnp.maximum(0.0, 1.0 - progress)


def _cosine(progress: jax.Array) -> jax.Array:
  return jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(jnp.pi * progress)))


# The share of the learning rate that is left, by how much of the run after the warm-up
# is over (0 to 1).
SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
  "constant": _constant,
  "cosine": _cosine,
  "linear": _linear,
}


def schedule(name: str, learning_rate: float, total: int, warmup: int) -> Schedule:
  """The learning rate by step, from 0 on, float32.

  The same as transformers' get_{constant,linear,cosine}_schedule_with_warmup: a warm-up
  starts at zero, so the first step of a run with one changes nothing.

  Args:
    name: a key of `SCHEDULES`.
    learning_rate: at the end of the warm-up.
    total, warmup: in steps.
  """
  decay = SCHEDULES[name]

  def rate(step: jax.Array) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    rise = step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return learning_rate * jnp.where(step < warmup, rise, decay(progress))

  return rate


# transformers' Trainer decays all but biases and norms, by these parts of a name. A
# LoRA's factors are called lora_A.weight there, so they do decay.
_NOT_DECAYED = re.compile(
  r"(^|/)(bias|scale)$|((^|[/_])|layer|rms)norm(_\d+)?(/|$)", re.IGNORECASE
)


def decay_mask(trained: PyTree) -> PyTree:
  """True for the trained leaves that weight decay acts on.

  Args:
    trained: deltas by slash path of the base leaf, untrained leaves None. The path of
      a leaf that is trained in full is the base leaf's; a factor adds its own name.
  """

  def decays(path: str, leaf: jax.Array) -> bool:
    return not _NOT_DECAYED.search(path)

  return map_with_path(decays, trained)


def optimizer(
  rate: Schedule,
  *,
  name: str = "adamw",
  weight_decay: float = 0.0,
  grad_clip: float = math.inf,
  lora_plus_ratio: float = 1.0,
  **fields: Any,
) -> optax.GradientTransformation:
  """An optimiser as torch and transformers' Trainer run it.

  Clipping, the direction, decoupled decay, and the learning rate.

  Args:
    name: a key of `OPTIMIZERS`.
    weight_decay, grad_clip, lora_plus_ratio: see `TrainConfig`.
    **fields: of `TrainConfig`, those that the optimiser reads and more.
  """
  return optax.chain(
    optax.clip_by_global_norm(grad_clip),
    OPTIMIZERS[name].direction(fields),
    optax.add_decayed_weights(weight_decay, mask=decay_mask),
    *(() if lora_plus_ratio == 1.0 else (_lora_plus(lora_plus_ratio),)),
    optax.scale_by_learning_rate(rate),
  )


def _lora_plus(ratio: float) -> optax.GradientTransformation:
  """LoRA+ (arXiv 2402.12354): another learning rate for the factors b.

  As PEFT's create_loraplus_optimizer, but for embeddings, which are no group of their
  own here: leaves of one axis have the rate of b too.
  """

  def init(trained):
    if not any(jax.tree.leaves(of_leaves(is_other_factor, trained))):
      raise LoraxError(
        "train.lora_plus_ratio: no trained leaf is the factor b of a low-rank delta"
      )
    return optax.EmptyState()

  def each(delta: Delta, name: str) -> jax.Array:
    x = delta.leaves()[name]
    return ratio * x if is_other_factor(delta, name) or x.ndim == 1 else x

  return optax.GradientTransformation(
    init, lambda updates, state, trained: (of_leaves(each, updates), state)
  )

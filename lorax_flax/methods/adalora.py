"""AdaLoRA (arXiv 2303.10512): W + scale * a diag(e) b, and a budget for all ranks.

As it trains, triplets of a column of a, an entry of e and a row of b that matter least
get e = 0, until `target_r` of them are left for each kernel on average. a and b are
kept near to orthonormal by a penalty.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax_flax.errors import LoraxError
from lorax_flax.methods.axes import Shape
from lorax_flax.methods.low_rank import LowRank
from lorax_flax.methods.peft_form import TRANSPOSED, Form, PeftForm
from lorax_flax.nodes import node

_ATTENTION = ("query", "key", "value", "dense")
_T5 = ("q", "k", "v", "o", "wi")


@node
@dataclass(frozen=True)
class AdaLoRA(LowRank):
  """W' = W + scale * r / (r + 1e-5) * a diag(e) b, as PEFT; other fields as `LowRank`.

  Attributes:
    e: (*stack, r), float32, trained; starts at zero.
    target_r: number of triplets that each kernel keeps on average.
    tinit: number of steps before the budget falls.
    tfinal: number of steps after it has fallen, in which the choice stays.
    deltaT: number of steps from one choice to the next.
    beta1, beta2: of the running means of sensitivity and of its uncertainty.
    orth_reg_weight: of the penalty.
    total_step: number of steps of the training.
  """

  e: jax.Array = field(kw_only=True)
  target_r: int = field(default=8, metadata={"static": True})
  tinit: int = field(default=0, metadata={"static": True})
  tfinal: int = field(default=0, metadata={"static": True})
  deltaT: int = field(default=1, metadata={"static": True})
  beta1: float = field(default=0.85, metadata={"static": True})
  beta2: float = field(default=0.85, metadata={"static": True})
  orth_reg_weight: float = field(default=0.5, metadata={"static": True})
  total_step: int = field(default=0, metadata={"static": True})

  axes: ClassVar = LowRank.axes | {"e": ("stack", "rank")}
  trained = ("a", "b", "e")
  options: ClassVar = {
    "target_r": 8,
    "tinit": 0,
    "tfinal": 0,
    "deltaT": 1,
    "beta1": 0.85,
    "beta2": 0.85,
    "orth_reg_weight": 0.5,
    "total_step": 0,
  }
  pads_rank = False
  takes_tables = False
  takes_init = False
  peft = PeftForm(
    type="ADALORA",
    keys={
      "linear": {
        "lora_A": ("a", TRANSPOSED),
        "lora_B": ("b", TRANSPOSED),
        "lora_E": ("e", Form(ones=(1,))),
      }
    },
    fields={
      "init_r": ("r", 12),
      "lora_alpha": ("lora_alpha", 8),
      "lora_dropout": ("lora_dropout", 0.0),
      "bias": ("bias", "none"),
      "fan_in_fan_out": ("fan_in_fan_out", False),
      "rank_pattern": ("kept_ranks", {}),
    },
    extends_lora=True,
    off={
      **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), (False,)),
      **dict.fromkeys(("target_parameters", "trainable_token_indices"), (None,)),
      "ensure_weight_tying": (False,),
      "alpha_pattern": ({},),
    },
    options={name: name for name in options},
    training={"r": 8, "init_lora_weights": True},
    only="lora_only",
    pruned_by="lora_E",
    targets={
      "t5": _T5,
      "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
      "roberta": _ATTENTION,
      "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
    },
  )

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """PEFT's start: a and b normal with std 0.02, e zero.

    Raises:
      LoraxError: options that leave nothing to allocate, or no number of steps.
    """
    del kernel
    _check(target.options, target.rank)
    shapes = cls.layer_shapes(target)

    def draw(key):
      keys = jax.random.split(key)
      a, b = (
        0.02 * jax.random.normal(k, shapes[n], jnp.float32)
        for k, n in zip(keys, ("a", "b"), strict=True)
      )
      return {"a": a, "b": b, "e": jnp.zeros(shapes["e"])}

    return cls.of_target(cls.drawn(target.key(key), target, draw), target, plan)

  def factors(self, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """a diag(e) and b in the layout of `Parts`, the scale folded into b."""
    a, b = super().factors(shape)
    return a * self.laid_out("e", shape), b * (self.rank / (self.rank + 1e-5))

  @classmethod
  def penalty(cls, deltas: Sequence[Self]) -> jax.Array:
    """The mean distance of aᵀ a and b bᵀ from 1, over all kernels."""
    distances: list[jax.Array] = []
    for delta in deltas:
      depth, one = delta.e.ndim - 1, jnp.eye(delta.rank)
      stack = delta.e.shape[:-1]
      a = delta.a.reshape(*stack, -1, delta.rank)
      b = delta.b.reshape(*stack, delta.rank, -1)
      for product in (
        jnp.einsum("...ir,...is->...rs", a, a, precision="highest"),
        jnp.einsum("...ro,...so->...rs", b, b, precision="highest"),
      ):
        own = jnp.broadcast_to(one, product.shape)
        square = jnp.square(product - own).sum((depth, depth + 1))
        distances.append(jnp.sqrt(square).reshape(-1))
    return deltas[0].orth_reg_weight * jnp.concatenate(distances).mean()

  @classmethod
  def scheduled(
    cls, optimizer: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    """The optimiser, each of whose steps is followed by PEFT's RankAllocator's."""

    def init(params):
      own = _own(params)
      # Two of each, since a step's state is donated.
      first, second = (jax.tree.map(jnp.zeros_like, own) for _ in range(2))
      kept = {path: jnp.ones_like(delta.e, bool) for path, delta in own.items()}
      state = optimizer.init(params)
      return Allocation(state, jnp.int32(0), first, second, kept)

    def update(grads, state, params=None):
      updates, inner = optimizer.update(grads, state.inner, params)
      old, change, slopes = map(_own, (params, updates, grads))
      now = state.after(optax.apply_updates(old, change), slopes)
      for path, delta in change.items():
        e = jnp.where(now.masks() & ~now.kept[path], -old[path].e, delta.e)
        updates = {**updates, path: replace(delta, e=e)}
      return updates, now._replace(inner=inner)

    return optax.GradientTransformation(init, update)


class Allocation(NamedTuple):
  """The state of the schedule.

  Attributes:
    inner: the optimiser's.
    steps: number of those taken.
    sensitivity, uncertainty: running means, of each trained number.
    kept: by path, the entries of e that the last choice left, (*stack, r).
  """

  inner: Any
  steps: jax.Array
  sensitivity: dict[str, AdaLoRA]
  uncertainty: dict[str, AdaLoRA]
  kept: dict[str, jax.Array]

  def after(
    self, params: dict[str, AdaLoRA], grads: dict[str, AdaLoRA]
  ) -> "Allocation":
    """The state after a step.

    Args:
      params: the trained leaves after it.
      grads: what it was taken with.
    """
    steps, (first, *_) = self.steps + 1, params.values()
    budget, end = self._budget(), first.total_step - first.tfinal

    def mean(beta, old, new):
      return jnp.where(steps < end, beta * old + (1 - beta) * new, old)

    seen = jax.tree.map(lambda x, slope: jnp.abs(x * slope), params, grads)
    sensitivity = jax.tree.map(
      lambda old, x: mean(first.beta1, old, x), self.sensitivity, seen
    )
    uncertainty = jax.tree.map(
      lambda old, x, m: mean(first.beta2, old, jnp.abs(x - m)),
      self.uncertainty,
      seen,
      sensitivity,
    )
    scores = jax.tree.map(jnp.multiply, sensitivity, uncertainty)
    scores = {path: _of_triplets(score) for path, score in scores.items()}
    every = jnp.sort(jnp.concatenate([x.reshape(-1) for x in scores.values()]))
    left = jnp.asarray(budget)[jnp.minimum(steps, end)]
    threshold = every[jnp.maximum(every.size - left, 1) - 1]
    chosen = (left > 0) & (steps <= end)
    kept = {
      path: jnp.where(chosen, score > threshold, self.kept[path])
      for path, score in scores.items()
    }
    return Allocation(self.inner, steps, sensitivity, uncertainty, kept)

  def masks(self) -> jax.Array:
    """True where the step that led here is one after which entries of e become zero."""
    first = next(iter(self.sensitivity.values()))
    end = first.total_step - first.tfinal
    left = jnp.asarray(self._budget())[jnp.minimum(self.steps, end)]
    return (left > 0) | (self.steps > end)

  def _budget(self) -> np.ndarray:
    """The number of triplets to keep after each step, int32; 0 where none is chosen."""
    first = next(iter(self.sensitivity.values()))
    start = sum(kept.size for kept in self.kept.values())
    target = first.target_r * start // first.e.shape[-1]
    end, found = first.total_step - first.tfinal, []
    for step in range(end + 1):
      share = 1 - (step - first.tinit) / (end - first.tinit)
      chooses = step == end or (step > first.tinit and step % first.deltaT == 0)
      found.append(int((start - target) * share**3 + target) if chooses else 0)
    return np.array(found, np.int32)


def _own(tree: dict[str, Any]) -> dict[str, AdaLoRA]:
  return {path: delta for path, delta in tree.items() if isinstance(delta, AdaLoRA)}


def _of_triplets(score: AdaLoRA) -> jax.Array:
  """The importance of each triplet by that of its numbers, (*stack, r)."""
  stack, rank = score.e.shape[:-1], score.e.shape[-1]
  a = score.a.reshape(*stack, -1, rank).mean(-2)
  b = score.b.reshape(*stack, rank, -1).mean(-1)
  return score.e + a + b


def _check(options: Mapping[str, Any], rank: int) -> None:
  """Raises LoraxError where the options leave nothing to allocate."""
  total, target = options["total_step"], options["target_r"]
  if total <= 0:
    raise LoraxError(
      "adalora needs the number of steps of the training, in which its budget falls:"
      " give the option total_step"
    )
  if not 0 < target < rank:
    raise LoraxError(
      f"adalora: target_r={target} must be from 1 to {rank - 1}, below the rank {rank}"
      " that it starts with"
    )
  if not 0 <= options["tinit"] < total - options["tfinal"] <= total:
    raise LoraxError(
      f"adalora: tinit={options['tinit']}, tfinal={options['tfinal']} and"
      f" total_step={total} leave no steps in which the budget falls: lower tinit or"
      " tfinal"
    )
  if options["deltaT"] < 1:
    raise LoraxError(f"adalora: deltaT={options['deltaT']} must be 1 or more")

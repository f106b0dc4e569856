"""VB-LoRA (arXiv 2405.15179): factors made of the vectors of one bank."""

from dataclasses import dataclass, field
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError
from lorax_flax.methods.axes import fans, quotient
from lorax_flax.methods.kernel_delta import MethodDelta
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import AS_IS, PeftForm
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class VBLoRA(MethodDelta):
  """W' = W + a b, each piece of a factor a mean of vectors of the bank.

  The weights of a mean are the softmax of the topk largest logits of the piece.

  Attributes:
    logits_a: (*stack, r, in / v, num_vectors), float32, trained.
    logits_b: (*stack, out / v, r, num_vectors), float32, trained.
    bank: (num_vectors, v), float32, trained; the same in all targets, v the option
      vector_length.
    topk: number of vectors in a mean.
  """

  logits_a: jax.Array
  logits_b: jax.Array
  bank: jax.Array
  topk: int = field(metadata={"static": True})

  axes: ClassVar = {
    "logits_a": ("stack", "rank", "in_pieces", "num_vectors"),
    "logits_b": ("stack", "out_pieces", "rank", "num_vectors"),
    "bank": ("num_vectors", "vector_length"),
  }
  trained = ("logits_a", "logits_b", "bank")
  common = ("bank",)
  per_trial = ()
  options: ClassVar = {
    "num_vectors": 256,
    "vector_length": 256,
    "topk": 2,
    "bank_bound": 0.02,
    "logits_std": 0.1,
  }
  pads_rank = False
  takes_tables = False
  peft = PeftForm(
    type="VBLORA",
    keys={
      "linear": {
        "vblora_logits_A": ("logits_a", AS_IS),
        "vblora_logits_B": ("logits_b", AS_IS),
      }
    },
    shared={"vblora_vector_bank": ("bank", AS_IS)},
    fields={
      "r": ("r", 4),
      "vblora_dropout": ("lora_dropout", 0.0),
      "bias": ("bias", "none"),
      "fan_in_fan_out": ("fan_in_fan_out", False),
    },
    options={
      "num_vectors": "num_vectors",
      "vector_length": "vector_length",
      "topk": "topk",
      "init_vector_bank_bound": "bank_bound",
      "init_logits_std": "logits_std",
    },
    # A folder has all logits, or the largest: its keys say so.
    off={"save_only_topk_weights": (False, True)},
    topk_of="num_vectors",
    targets={
      "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
      "t5": ("q", "k", "v", "o", "wi", "wo"),
    },
  )

  @classmethod
  def axis_sizes(cls, shape, roles, sizes):
    v, topk, most = (sizes[n] for n in ("vector_length", "topk", "num_vectors"))
    if not 1 <= topk <= most:
      raise LoraxError(f"vblora: topk={topk} must be from 1 to num_vectors={most}")
    pieces = {
      f"{side}_pieces": quotient("vblora: vector_length", v, fan, f"{side}puts", shape)
      for side, fan in zip(("in", "out"), fans(shape, roles), strict=True)
    }
    return {**sizes, **pieces}

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """PEFT's start: normal logits and a uniform bank; the change is small, not zero."""
    del kernel
    shapes, options = cls.layer_shapes(target), target.options
    bound, std = options["bank_bound"], options["logits_std"]
    bank = jax.random.uniform(key, shapes["bank"], jnp.float32, -bound, bound)

    def draw(key):
      keys = dict(zip(("logits_a", "logits_b"), jax.random.split(key), strict=True))
      return {n: std * jax.random.normal(k, shapes[n]) for n, k in keys.items()}

    leaves = cls.drawn(target.key(key), target, draw)
    return cls.of_target({**leaves, "bank": bank}, target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel."""
    *stack, rank, _, _ = self.logits_a.shape
    a = self._means(self.logits_a).reshape((*stack, rank, -1))
    b = jnp.swapaxes(self._means(self.logits_b), -1, -2).reshape((*stack, -1, rank))
    return Parts(
      self.placed(jnp.swapaxes(a, -1, -2), ("stack", "in", "rank"), w.shape),
      self.placed(b, ("stack", "out", "rank"), w.shape),
    )

  def _means(self, logits: jax.Array) -> jax.Array:
    """The vector of each piece, (…, v)."""
    largest, indices = jax.lax.top_k(logits, self.topk)
    weights = jax.nn.softmax(largest, axis=-1)
    return (weights[..., None] * self.bank[indices]).sum(-2)

"""Super-Tuning (arXiv 2607.09287): a sparse change, at the largest weights."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError
from lorax_flax.methods.axes import fans
from lorax_flax.methods.kernel_delta import MethodDelta, matrices
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import AS_IS, Form, PeftForm
from lorax_flax.nodes import node
from lorax_flax.quant import dense


@node
@dataclass(frozen=True)
class SuperTuning(MethodDelta):
  """W' = W + D, D zero but at the n largest of |W|: the paper's Super.

  n is the part 1 - sparsity of the kernel's numbers; with the option select_top=False
  they are the smallest.

  Attributes:
    nonzeros: (*stack, n), float32, trained; starts at zero.
    flat_places: (*stack, n), int32, in the kernel as (out, in), flat.
  """

  nonzeros: jax.Array
  flat_places: jax.Array

  axes: ClassVar = {
    "nonzeros": ("stack", "places"),
    "flat_places": ("stack", "places"),
  }
  trained = ("nonzeros",)
  per_trial = ("flat_places",)
  has_rank = False
  takes_tables = False
  options: ClassVar = {"sparsity": 0.99, "select_top": True}
  peft = PeftForm(
    type="SUPERTUNING",
    keys={
      "linear": {
        "supertuning_values": ("nonzeros", AS_IS),
        "supertuning_indices": ("flat_places", Form(holds_places=True)),
      }
    },
    lacks=("exclude_modules", "layers_to_transform", "layers_pattern"),
    options={"sparsity": "sparsity", "select_top": "select_top"},
    # With a rank it is the paper's Supra, which has a LoRA beside.
    off={"r": (None,), "lora_alpha": (None,), "save_precomputed_indices": (True,)},
    training={"lora_dropout": 0.0, "init_weights": True},
  )

  @classmethod
  def axis_sizes(cls, shape, roles, sizes):
    fan_in, fan_out = fans(shape, roles)
    sparsity, size = sizes["sparsity"], fan_in * fan_out
    places = int(size * (1 - sparsity))  # in PEFT's order, for its rounding
    if not 0 < places <= size:
      most = math.floor(1e4 - 1e4 / size) / 1e4
      raise LoraxError(
        f"supertuning: sparsity {sparsity} leaves {places} of the {size} numbers of a"
        f" kernel of shape {shape}: choose from 0 to {most}"
      )
    return {**sizes, "places": places}

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """Zero."""
    (shape,) = cls.layer_shapes(target).values()
    leaves = cls.drawn(key, target, lambda _: {"nonzeros": jnp.zeros(shape)})
    w = matrices(dense(kernel), target.roles, target.layers)
    sizes = jnp.abs(jnp.swapaxes(w, -1, -2)).reshape((*w.shape[:-2], -1))
    sign = 1 if target.options["select_top"] else -1
    _, flat_places = jax.lax.top_k(sign * sizes, *shape)
    return cls.of_target({**leaves, "flat_places": flat_places}, target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, its change formed."""
    return self.sparse_parts(self.nonzeros, self.flat_places, w.shape)

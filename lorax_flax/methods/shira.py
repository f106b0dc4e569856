"""SHiRA (arXiv 2406.13175): a sparse change, at places that are drawn once."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError
from lorax_flax.methods.axes import fans
from lorax_flax.methods.draws import places
from lorax_flax.methods.kernel_delta import MethodDelta
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import Form, PeftForm
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class SHiRA(MethodDelta):
  """W' = W + D, D zero but at r (in + out) places: as many numbers as LoRA trains.

  The option random_seed is of torch's generator, and all kernels of one shape have the
  same places, which are PEFT's; None: each kernel's own, drawn by its key.

  Attributes:
    nonzeros: (*stack, in + out, r), float32, trained; starts at zero.
    coordinates: (*stack, 2, r (in + out)), int32, the output and the input of each.
  """

  nonzeros: jax.Array
  coordinates: jax.Array

  axes: ClassVar = {
    "nonzeros": ("stack", "width", "rank"),
    "coordinates": ("stack", "sides", "places"),
  }
  trained = ("nonzeros",)
  per_trial = ("coordinates",)
  pads_rank = False
  takes_tables = False
  options: ClassVar = {"random_seed": None}
  peft = PeftForm(
    type="SHIRA",
    keys={
      "linear": {
        "shira_weight": ("nonzeros", Form(split=0)),
        "shira_indices": ("coordinates", Form(holds_places=True)),
      }
    },
    fields={"r": ("r", 32), "fan_in_fan_out": ("fan_in_fan_out", False)},
    lacks=("exclude_modules", "layers_to_transform", "layers_pattern"),
    options={"random_seed": "random_seed"},
    training={"mask_type": "random", "init_weights": True},
  )

  @classmethod
  def axis_sizes(cls, shape, roles, sizes):
    fan_in, fan_out = fans(shape, roles)
    rank, width, most = sizes["rank"], fan_in + fan_out, fan_in * fan_out
    if rank * width > most:
      raise LoraxError(
        f"shira: rank {rank} is {rank * width} numbers, above the {most} of a kernel of"
        f" shape {shape}: choose {max(1, most // width)} or less"
      )
    return {**sizes, "width": width, "sides": 2, "places": rank * width}

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """Zero, at PEFT's places."""
    del kernel
    fan_in, fan_out = fans(target.shape, target.roles)
    (shape,) = cls.layer_shapes(target).values()
    size, n, seed = fan_in * fan_out, math.prod(shape), target.options["random_seed"]

    def draw(key):
      if seed is None:
        chosen = jax.random.choice(key, size, (n,), replace=False)
      else:
        chosen = jnp.asarray(places(size, n, seed), jnp.int32)
      at = jnp.stack(jnp.divmod(jnp.sort(chosen), fan_in)).astype(jnp.int32)
      return {"nonzeros": jnp.zeros(shape), "coordinates": at}

    return cls.of_target(cls.drawn(target.key(key), target, draw), target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, its change formed."""
    outs, ins = jnp.moveaxis(self.coordinates, -2, 0)
    places = outs * fans(w.shape, self.roles)[0] + ins
    return self.sparse_parts(self.nonzeros.reshape(places.shape), places, w.shape)

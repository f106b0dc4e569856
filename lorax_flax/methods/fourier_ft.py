"""FourierFT (arXiv 2405.03003): a change with few frequencies, at random places."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.errors import LoraxError
from lorax_flax.methods.axes import by_role
from lorax_flax.methods.draws import places
from lorax_flax.methods.kernel_delta import MethodDelta
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import AS_IS, PeftForm
from lorax_flax.nodes import node


@node
@dataclass(frozen=True)
class FourierFT(MethodDelta):
  """W' = W + scaling * Re ifft2(S)ᵀ, S (out, in) zero but at the spectrum's places.

  Attributes:
    spectrum: (*stack, n_frequency), float32, trained; starts at zero.
    scaling: factor of the change.
    random_loc_seed: of torch's generator, which gives the places; all kernels of one
      shape have the same.
  """

  spectrum: jax.Array
  scaling: float = field(default=150.0, metadata={"static": True})
  random_loc_seed: int = field(default=777, metadata={"static": True})

  axes: ClassVar = {"spectrum": ("stack", "n_frequency")}
  trained = ("spectrum",)
  per_trial = ()
  has_rank = False
  takes_tables = False
  options: ClassVar = {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777}
  peft = PeftForm(
    type="FOURIERFT",
    keys={"linear": {"fourierft_spectrum": ("spectrum", AS_IS)}},
    fields={
      "bias": ("bias", "none"),
      "fan_in_fan_out": ("fan_in_fan_out", False),
    },
    only="fourier_only",
    options={name: name for name in options},
    off={"n_frequency_pattern": ({},)},
    # PEFT's own default is False, which does not start at the base.
    training={"init_weights": True},
    targets={"gpt2": ("mlp.c_proj",)},
  )

  @property
  def n_frequency(self) -> int:
    return self.spectrum.shape[-1]

  @classmethod
  def axis_sizes(cls, shape, roles, sizes):
    axes = by_role(roles)
    size = math.prod(shape[i] for i in (*axes["in"], *axes["out"]))
    if not 0 < sizes["n_frequency"] <= size:
      raise LoraxError(
        f"fourierft: n_frequency={sizes['n_frequency']} must be from 1 to the {size}"
        f" numbers of a kernel of shape {shape}"
      )
    return sizes

  @classmethod
  def start(cls, key, kernel, target, plan) -> Self:
    """Zero."""
    del kernel
    return cls.zeros(key, target, plan)

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, its change formed."""
    axes = by_role(self.roles)
    fan_in, fan_out = (math.prod(w.shape[i] for i in axes[r]) for r in ("in", "out"))
    at = places(fan_in * fan_out, self.n_frequency, self.random_loc_seed)
    stack = self.spectrum.shape[:-1]
    flat = jnp.zeros((*stack, fan_in * fan_out)).at[..., at].set(self.spectrum)
    waves = jnp.fft.ifft2(flat.reshape((*stack, fan_out, fan_in))).real
    return self.full_parts(self.scaling * jnp.swapaxes(waves, -1, -2), w.shape)

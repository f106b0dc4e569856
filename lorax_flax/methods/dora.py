"""DoRA (arXiv 2402.09353): a magnitude for each output, and LoRA for the direction.

W' = m / ‖W + scale * a @ b‖ * (W + scale * a @ b), the norm taken over the in axes and
kept out of the gradient (section 4.3 of the paper; PEFT does the same).
"""

import string
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lorax_flax.methods.axes import by_role
from lorax_flax.methods.kernel_delta import Plan, Target
from lorax_flax.methods.lora import KEYS, LoRA
from lorax_flax.methods.low_rank import LowRank
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.peft_form import AS_IS, Form, PeftForm
from lorax_flax.nodes import node
from lorax_flax.quant import dense


@node
@dataclass(frozen=True)
class DoRA(LowRank):
  """LoRA with a magnitude. The other fields are those of `LowRank`.

  Attributes:
    magnitude: (*stack, *out), float32, trained; starts as the norms of W.
  """

  magnitude: jax.Array = field(kw_only=True)

  axes: ClassVar = LowRank.axes | {"magnitude": ("stack", "out")}
  trained = ("a", "b", "magnitude")
  irreversible = "merged weights do not tell the norms of the base"
  peft = PeftForm(
    "use_dora",
    {
      kind: KEYS[kind] | {"lora_magnitude_vector": ("magnitude", form)}
      for kind, form in (
        ("linear", AS_IS),
        ("embedding", AS_IS),
        ("conv", Form(ones=(0, 2, 3))),
      )
    },
  )

  @classmethod
  def start(cls, key: jax.Array, kernel: Any, target: Target, plan: Plan) -> Self:
    """LoRA's factors, and the magnitudes that change nothing."""
    lora = LoRA.start(key, kernel, target, plan)
    return cls(**vars(lora), magnitude=norms(lora, dense(kernel)))

  def parts(self, w: jax.Array) -> Parts:
    """The changed kernel, unevaluated."""
    norm = jax.lax.stop_gradient(norms(self, w))
    # A column of zeros has no direction: it is left as it is.
    scale = jnp.where(norm > 0, self.magnitude / jnp.where(norm > 0, norm, 1.0), 1.0)
    out_scale = self.laid_out("magnitude", w.shape, fill=1.0, value=scale)
    return Parts(*self.factors(w.shape), out_scale=out_scale)


def norms(delta: LowRank, w: jax.Array) -> jax.Array:
  """‖W + scale * a @ b‖ over the in axes, (*stack, *out), float32.

  By its expansion, ‖W‖² + 2 <W, a b> + ‖a b‖², so that the sum is never formed.
  """
  axes, kernel = by_role(delta.roles), string.ascii_lowercase[: w.ndim]
  s, i, o = ("".join(kernel[n] for n in axes[role]) for role in ("stack", "in", "out"))
  if delta.layers is not None:
    w = jnp.take(w, jnp.asarray(delta.layers), axis=axes["stack"][0])
  w, a, b = w.astype(jnp.float32), delta.a, delta.scaled(delta.b)

  def einsum(spec, *xs):
    return jnp.einsum(spec, *xs, precision="highest")

  w_a = einsum(f"{kernel},{s}{i}z->{s}z{o}", w, a)
  a_a = einsum(f"{s}{i}y,{s}{i}z->{s}yz", a, a)
  a_a_b = einsum(f"{s}yz,{s}y{o}->{s}z{o}", a_a, b)
  square = einsum(f"{kernel},{kernel}->{s}{o}", w, w)
  square += einsum(f"{s}z{o},{s}z{o}->{s}{o}", 2.0 * w_a + a_a_b, b)
  return jnp.sqrt(jnp.maximum(square, 0.0))

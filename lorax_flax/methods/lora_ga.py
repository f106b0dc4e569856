"""LoRA-GA (arXiv 2407.05000): LoRA that starts with the loss's gradient."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from lorax_flax.errors import LoraxError, check_known
from lorax_flax.methods.axes import fans
from lorax_flax.methods.from_start import FromStart
from lorax_flax.methods.kernel_delta import matrices
from lorax_flax.nodes import node

_SCALINGS = ("stable", "gd_scale", "unit")


@node
@dataclass(frozen=True)
class LoRAGA(FromStart):
  """Fields of `FromStart`; the options are of the start.

  a starts with the first r of the gradient's directions of the inputs, and b with the
  next r of those of the outputs, times their singular values: the first step is then
  nearest to that of training in full. `adapt.gradients` has the gradients.

  scaling is PEFT's scale: "stable" multiplies b by out^¼ / √stable_gamma, "gd_scale"
  divides both by alpha / r, "unit" leaves them.
  """

  starts_from: ClassVar[str] = "gradient"
  options: ClassVar = {"scaling": "stable", "stable_gamma": 16}

  @classmethod
  def axis_sizes(cls, shape, roles, sizes):
    least = min(fans(shape, roles))
    if 2 * sizes["rank"] > least:
      raise LoraxError(
        f"lora_ga: rank {sizes['rank']} takes {2 * sizes['rank']} directions of a "
        f"gradient of shape {shape}, which has {least}: choose {least // 2} or less"
      )
    return sizes

  @classmethod
  def of_matrices(cls, key, w, scale, target):
    """Singular directions of the gradients."""
    del key, w
    w = matrices(target.measured, target.roles, target.layers)
    rank, scaling = target.rank, target.options["scaling"]
    check_known("lora_ga: scaling", scaling, _SCALINGS)
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    # torch's weight is (out, in): v has the outputs' directions here.
    first = u[..., :rank]
    second = s[..., rank : 2 * rank, None] * v[..., rank : 2 * rank, :]
    if scaling == "stable":
      second = second * w.shape[-1] ** 0.25 / target.options["stable_gamma"] ** 0.5
    elif scaling == "gd_scale":
      first, second = first / scale, second / scale
    return first, second

"""Rotary positions: pairs of features, rotated by an angle that grows with position.

Source: arXiv 2104.09864; the scalings as transformers' modeling_rope_utils computes
them for a text of a given length, in float32.

Shapes: B batch (or 1), T tokens, H heads, K head size, F pairs that are rotated.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.errors import LoraxError, unknown
from lorax_flax.sharding import activations as spread

# The angles' cosines and sines, BxTx1xF each.
Rotations = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Rope:
  """One kind of rotary positions, under Hugging Face's names.

  Attributes:
    rope_type: "default", "linear", "dynamic", "yarn", "longrope", "llama3", or "none",
      without rotation.
    rope_theta: the base of the wavelengths.
    partial_rotary_factor: the share of a head's features, its first, that is rotated.
    max_position_embeddings: the model's length, in tokens.
    original_max_position_embeddings: its length before scaling; by default
      max_position_embeddings.
    factor: of the scaling; for "yarn" and "longrope" by default the ratio of the two.
    attention_factor: of cosines and sines; by default it follows from the factor.
    The rest belongs to one type each; `_REQUIRED` lists the fields that it needs.
  """

  rope_type: str = "default"
  rope_theta: float = 10000.0
  partial_rotary_factor: float = 1.0
  max_position_embeddings: int = 2048
  original_max_position_embeddings: int | None = None
  factor: float | None = None
  attention_factor: float | None = None
  beta_fast: float | None = None
  beta_slow: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True
  short_factor: tuple[float, ...] | None = None
  long_factor: tuple[float, ...] | None = None
  low_freq_factor: float | None = None
  high_freq_factor: float | None = None

  def __post_init__(self):
    if self.rope_type not in _TYPES:
      raise LoraxError(unknown("rope_type", str(self.rope_type), _TYPES))
    for name in _REQUIRED.get(self.rope_type, ()):
      if getattr(self, name) is None:
        raise LoraxError(f"config: the rope_type {self.rope_type!r} needs {name}")

  @property
  def original(self) -> int:
    """The length, in tokens, before scaling."""
    return self.original_max_position_embeddings or self.max_position_embeddings

  @property
  def stretch(self) -> float:
    """The ratio of the lengths after and before scaling."""
    if self.factor is not None:
      return self.factor
    return self.max_position_embeddings / self.original


def _powers(rope: Rope, dim: int, base: Any = None) -> Any:
  """base^(2i/dim) for each pair i: F, or BxTxF of a base of BxTx1; float32."""
  exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
  if base is None:
    return np.float32(rope.rope_theta) ** exponents
  return base ** exponents[None, None, :]


def _default(rope, dim, length):
  return 1.0 / _powers(rope, dim), 1.0


def _linear(rope, dim, length):
  return 1.0 / _powers(rope, dim) / np.float32(rope.factor), 1.0


def _dynamic(rope, dim, length):
  most = rope.max_position_embeddings
  beyond = jnp.maximum(length.astype(jnp.float32) / most - 1.0, 0.0)
  grown = (1.0 + rope.factor * beyond) ** (dim / (dim - 2))
  return 1.0 / _powers(rope, dim, rope.rope_theta * grown), 1.0


def _yarn(rope, dim, length):
  """arXiv 2309.00071: slow pairs are interpolated, fast ones left, a ramp between."""
  powers = _powers(rope, dim)

  def edge(rotations):
    turns = rope.original / (rotations * 2.0 * math.pi)
    return dim * math.log(turns) / (2.0 * math.log(rope.rope_theta))

  low, high = edge(rope.beta_fast or 32), edge(rope.beta_slow or 1)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  if low == high:
    high += 0.001
  pairs_F = np.arange(len(powers), dtype=np.float32)
  ramp = np.clip((pairs_F - low) / (high - low), 0.0, 1.0).astype(np.float32)
  slow = 1.0 / (np.float32(rope.stretch) * powers)
  frequencies = slow * ramp + 1.0 / powers * (1.0 - ramp)
  if rope.attention_factor is not None:
    return frequencies, rope.attention_factor

  def temperature(mscale):
    if rope.stretch <= 1.0:
      return 1.0
    return 0.1 * mscale * math.log(rope.stretch) + 1.0

  if rope.mscale and rope.mscale_all_dim:
    return frequencies, temperature(rope.mscale) / temperature(rope.mscale_all_dim)
  return frequencies, temperature(1.0)


def _longrope(rope, dim, length):
  """arXiv 2402.13753: a factor for each pair, one set for short texts, one for long."""
  powers = _powers(rope, dim)
  for name in ("short_factor", "long_factor"):
    if len(found := getattr(rope, name)) != len(powers):
      raise LoraxError(
        f"config: {name} has {len(found)} numbers for {len(powers)} pairs of features"
      )
  short, long = np.asarray([rope.short_factor, rope.long_factor], np.float32)
  factors = jnp.where(length > rope.original, long[None, None, :], short[None, None, :])
  return 1.0 / (factors * powers[None, None, :]), longrope_scale(rope)


def longrope_scale(rope: Rope) -> float:
  """The factor of cosines and sines of "longrope"."""
  if rope.attention_factor is not None:
    return rope.attention_factor
  if rope.stretch <= 1.0:
    return 1.0
  return math.sqrt(1.0 + math.log(rope.stretch) / math.log(rope.original))


def _llama3(rope, dim, length):
  """Llama 3.1: slow pairs are interpolated, and those between the two bounds partly."""
  frequencies = 1.0 / _powers(rope, dim)
  waves = 2.0 * np.float32(math.pi) / frequencies
  low, high = rope.low_freq_factor, rope.high_freq_factor
  share = (rope.original / waves - low) / (high - low)
  slow = frequencies / np.float32(rope.factor)
  between = (1.0 - share) * slow + share * frequencies
  scaled = np.where(waves > rope.original / low, slow, between)
  return np.where(waves < rope.original / high, frequencies, scaled), 1.0


def _none(rope, dim, length):
  return np.zeros(len(range(0, dim, 2)), np.float32), 1.0


# (rope, number of rotated features, lengths BxTx1) -> frequencies F or BxTxF, scale.
_TYPES: dict[str, Callable[[Rope, int, Any], tuple[Any, float]]] = {
  "default": _default,
  "dynamic": _dynamic,
  "linear": _linear,
  "llama3": _llama3,
  "longrope": _longrope,
  "none": _none,
  "yarn": _yarn,
}
_REQUIRED = {
  "dynamic": ("factor",),
  "linear": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
  "longrope": ("short_factor", "long_factor"),
}


def wavelength_factors(rope: Rope, head_size: int) -> np.ndarray:
  """Factors of the wavelengths of a scaling that no length changes, F float32."""
  dim = int(head_size * rope.partial_rotary_factor)
  frequencies, _ = _TYPES[rope.rope_type](rope, dim, None)
  return (1.0 / _powers(rope, dim) / frequencies).astype(np.float32)


def rotations(
  rope: Rope,
  head_size: int,
  positions_BxT: jax.Array,
  lengths_BxT: jax.Array,
  dtype: Any,
) -> Rotations:
  """Cosines and sines of the angles at these positions.

  Args:
    positions_BxT: int32.
    lengths_BxT: int32, of each token's text without padding: its last position plus
      one; Bx1 where a row is one text. Used by "dynamic" and "longrope", whose angles
      depend on the length.
    dtype: of the result.
  """
  dim = int(head_size * rope.partial_rotary_factor)
  frequencies, scale = _TYPES[rope.rope_type](rope, dim, lengths_BxT[:, :, None])
  frequencies = jnp.asarray(frequencies, jnp.float32)
  if frequencies.ndim == 1:
    frequencies = frequencies[None, None, :]
  positions = positions_BxT.astype(jnp.float32)[:, :, None, None]
  angles = positions * frequencies[:, :, None, :]
  cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
  return spread.shard_tokens((cos.astype(dtype), sin.astype(dtype)))


def rotate(x_BxTxHxK: jax.Array, by: Rotations) -> jax.Array:
  """Rotates each head's pairs: features i and i + F; those from 2F on stay."""
  cos, sin = by
  f = cos.shape[-1]
  a, b, rest = x_BxTxHxK[..., :f], x_BxTxHxK[..., f : 2 * f], x_BxTxHxK[..., 2 * f :]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)

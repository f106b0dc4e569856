"""A cache of the keys and values of tokens that a decoder has seen.

Rows have lengths of their own: a token's place is its number in its row, from 0. Each
layer has columns, and the token of place p is in column p modulo their number. A layer
with a sliding window has columns for its window alone, which is a ring; others have one
for every place.

Shapes: B rows, T tokens of a call, S columns, H heads of queries, G heads of keys and
values, K head size.

A prefix or a prompt has the first places; lengths count the tokens alone.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.errors import LoraxError
from lorax_flax.models import ops
from lorax_flax.nodes import node

# Keys and values of one layer, BxGxSxK each: heads first, as attention's products read
# them, so that no step transposes a cache.
KeyValues = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Layout:
  """The size of a family's cache.

  Attributes:
    heads, head_size: of keys and values.
    windows: for each layer, the number of places that a query attends to, its own
      included; None: all.
    max_length: number of places that the model has; None: without a bound.
    attends_to_source: layers attend to an encoder's output too.
  """

  heads: int
  head_size: int
  windows: tuple[int | None, ...]
  max_length: int | None = None
  attends_to_source: bool = False


@node
@dataclass(frozen=True)
class Chunk:
  """The places of the tokens of one call.

  Attributes:
    places_BxT: int32; negative for padding.
    starts_B: int32, number of tokens of each row before this call.
    length: number of places of the cache.
  """

  places_BxT: jax.Array
  starts_B: jax.Array
  length: int = field(metadata={"static": True})

  @property
  def ends_B(self) -> jax.Array:
    """Number of tokens of each row after this call."""
    return self.starts_B + jnp.sum(self.places_BxT >= 0, axis=1, dtype=jnp.int32)

  @property
  def positions_BxT(self) -> jax.Array:
    """The places, with zeros for padding."""
    return jnp.maximum(self.places_BxT, 0)


@node
@dataclass(frozen=True)
class Cache:
  """Keys and values of the tokens so far; a call with it returns it with its own added.

  Attributes:
    layers: the layers' KeyValues, or where layers attend to an encoder's output, pairs
      of those of the text and of the source: a tuple, or stacked as scanned layers are.
    lengths_B: int32, number of tokens of each row.
    source_BxN: of an encoder's N tokens, the mask; None without an encoder.
    length: maximal number of tokens of a row.
    virtual: number of places before the first token's.
    begun: whether what has these places is in the layers.
  """

  layers: Any
  lengths_B: jax.Array
  source_BxN: jax.Array | None
  length: int = field(metadata={"static": True})
  virtual: int = field(default=0, metadata={"static": True})
  begun: bool = field(default=True, metadata={"static": True})

  def chunk(
    self, mask_BxT: jax.Array, deterministic: bool, position_ids: Any = None
  ) -> Chunk:
    """Places of further tokens.

    Args:
      mask_BxT: nonzero where a token is; the others are padding, which leaves no trace.
      deterministic: of the call; a cache is of calls without dropout.
      position_ids: of the call; None, since they follow from the cache.

    Raises:
      LoraxError: dropout; positions; more tokens, or rows, than the cache has room for.
    """
    if not deterministic:
      raise LoraxError("a call with a cache has no dropout: deterministic=True")
    if position_ids is not None:
      raise LoraxError("position_ids beside a cache, from which positions follow")
    (rows, tokens), room = mask_BxT.shape, len(self.lengths_B)
    if rows != room:
      raise LoraxError(f"{rows} rows for a cache of {room}")
    if tokens > self.length + self.virtual:
      raise LoraxError(f"{tokens} tokens for a cache of {self.length}")
    starts_B = self.lengths_B + self.virtual
    real_BxT = mask_BxT != 0
    count_BxT = jnp.cumsum(real_BxT, axis=1, dtype=jnp.int32)
    places_BxT = jnp.where(real_BxT, starts_B[:, None] + count_BxT - 1, -1)
    return Chunk(places_BxT, starts_B, self.length + self.virtual)

  def grown(self, layers: Any, chunk: Chunk, source_BxN: Any = None) -> "Cache":
    """The cache after a call, with what its layers kept.

    Raises:
      LoraxError: an encoder's text of another shape than the cache has room for.
    """
    room, found = (x if x is None else x.shape for x in (self.source_BxN, source_BxN))
    if room != found:
      raise LoraxError(f"an encoder's text of shape {found} for a cache of {room}")
    lengths_B = chunk.ends_B - self.virtual
    return replace(self, layers=layers, lengths_B=lengths_B, source_BxN=source_BxN)

  @property
  def columns(self) -> int:
    """Number of tokens that the layer with the fewest columns has room for.

    Where a row has more, it can't go back to an earlier one: a ring has
    overwritten what that one attends to.
    """
    return min(x.shape[-2] for x in jax.tree.leaves(self.layers)) - self.virtual

  def moved(self, room: "Cache") -> "Cache":
    """A blank cache that is at least as long, with the same tokens."""
    layers = jax.tree.map(
      lambda new, x: jax.lax.dynamic_update_slice(new, x, (0,) * x.ndim),
      room.layers,
      self.layers,
    )
    return replace(self, layers=layers, length=room.length)

  def put(self, row: jax.Array, other: "Cache") -> "Cache":
    """The cache with the only row of another one, at most as long, in its row."""

    def written(x: jax.Array, new: jax.Array, axis: int) -> jax.Array:
      # A ring's columns wrap only once it is as long as its window: the columns of a
      # shorter one are the first ones of a longer.
      starts = [row if i == axis else 0 for i in range(x.ndim)]
      return jax.lax.dynamic_update_slice(x, new, starts)

    of_length = replace(other, length=self.length)
    return jax.tree.map(written, self, of_length, self.row_axes)

  def put_newest(self, rows_R: jax.Array, other: "Cache") -> "Cache":
    """The cache with the newest token of each row of another one, which began as its.

    Args:
      rows_R: numbers of the rows of `take` that the other one was.
    """

    def written(x: jax.Array, new: jax.Array, axis: int) -> jax.Array:
      column_R = (other.lengths_B + self.virtual - 1) % x.shape[-2]
      before = (slice(None),) * axis
      newest = new[*before, jnp.arange(len(rows_R)), :, column_R]
      return x.at[*before, rows_R, :, column_R].set(newest)

    layers = jax.tree.map(written, self.layers, other.layers, self.row_axes.layers)
    lengths_B = self.lengths_B.at[rows_R].set(other.lengths_B)
    return replace(self, layers=layers, lengths_B=lengths_B)

  def take(self, rows_B: jax.Array) -> "Cache":
    """Rows in another order, some of them repeated or left out: of beams, of slots."""
    return jax.tree.map(
      lambda x, axis: jnp.take(x, rows_B, axis=axis, mode="clip"), self, self.row_axes
    )

  @property
  def row_axes(self) -> "Cache":
    """The axis of each leaf that has the rows."""
    # A layer's leaves have four axes, behind that of the layers where they are stacked.
    layers = jax.tree.map(lambda x: x.ndim - 4, self.layers)
    of_source: Any = None if self.source_BxN is None else 0
    of_lengths: Any = 0
    return replace(self, layers=layers, lengths_B=of_lengths, source_BxN=of_source)


def blank(
  layout: Layout,
  batch: int,
  length: int,
  source_length: int = 0,
  *,
  dtype: Any,
  stacked: bool,
  virtual: int = 0,
) -> Cache:
  """A cache without tokens.

  Args:
    batch: number of rows.
    length: maximal number of tokens of a row, the prompt's and the new ones.
    source_length: number of tokens of an encoder's text.
    dtype: of keys and values.
    stacked: the layers are scanned. They then have equally many columns: where windows
      differ, one for every place.
    virtual: number of places before the tokens', which the first call fills; before
      those of the encoder's text, where there is one.

  Raises:
    LoraxError: more tokens than the model has positions.
  """
  if layout.attends_to_source:
    source_length, virtual = source_length + virtual, 0
  if layout.max_length is not None and length + virtual > layout.max_length:
    most = layout.max_length - virtual
    raise LoraxError(f"a cache of {length} tokens: the model takes at most {most}")
  places = length + virtual

  def key_values(columns: int) -> KeyValues:
    shape = (batch, layout.heads, columns, layout.head_size)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

  def layer(window: int | None) -> Any:
    own = key_values(places if window is None else min(window, places))
    return (own, key_values(source_length)) if layout.attends_to_source else own

  windows, source = layout.windows, None
  if stacked:
    only = windows[0] if len(set(windows)) == 1 else None
    repeated = lambda x: jnp.repeat(x[None], len(windows), axis=0)
    layers = jax.tree.map(repeated, layer(only))
  else:
    layers = tuple(map(layer, windows))
  if layout.attends_to_source:
    source = jnp.zeros((batch, source_length), jnp.int32)
  lengths_B = jnp.zeros(batch, jnp.int32)
  return Cache(layers, lengths_B, source, length, virtual, begun=not virtual)


def check_room(cache: Cache, tokens: Any) -> None:
  """Raises LoraxError unless every row has room for more tokens; waits for the device.

  Args:
    tokens: number of tokens of each row, (B,), or of all.
  """
  ends_B = np.asarray(cache.lengths_B) + np.asarray(tokens)
  if (most := int(ends_B.max())) > cache.length:
    raise LoraxError(
      f"row {int(ends_B.argmax())} of {most} tokens for a cache of {cache.length}"
    )


def attend(
  q_BxTxHxK: jax.Array,
  k_BxTxGxK: jax.Array,
  v_BxTxGxK: jax.Array,
  kept: KeyValues,
  chunk: Chunk,
  **options: Any,
) -> tuple[jax.Array, KeyValues]:
  """Attention of a call's tokens to those before and among them: BxTxHxK, kept.

  Args:
    kept: of one layer.
    **options: of `ops.attention_by_place`.
  """
  new = _written(kept[0], k_BxTxGxK, chunk), _written(kept[1], v_BxTxGxK, chunk)
  columns = kept[0].shape[2]
  if q_BxTxHxK.shape[1] == 1 or columns == chunk.length:
    # Nothing that a query attends to was overwritten; and nothing is copied.
    (k, v), places_BxS = new, _places(chunk.ends_B, columns)
  else:
    k, v = map(_joined, kept, (k_BxTxGxK, v_BxTxGxK))
    places_BxS = jnp.concatenate(
      [_places(chunk.starts_B, columns), chunk.places_BxT], axis=1
    )
  y = ops.attention_by_place(q_BxTxHxK, k, v, chunk.places_BxT, places_BxS, **options)
  return y, new


def _places(lengths_B: jax.Array, columns: int) -> jax.Array:
  """Places of the tokens in a layer's columns, BxS; negative where there is none."""
  last_Bx1 = lengths_B[:, None] - 1
  return last_Bx1 - (last_Bx1 - jnp.arange(columns, dtype=jnp.int32)[None]) % columns


def _written(x_BxGxSxK: jax.Array, new_BxTxGxK: jax.Array, chunk: Chunk) -> jax.Array:
  """The columns with those of the new tokens replaced."""
  columns = x_BxGxSxK.shape[2]
  # Of tokens that share a column, the last alone.
  first_Bx1 = jnp.maximum(chunk.ends_B - columns, 0)[:, None]
  written_BxT = chunk.places_BxT >= first_Bx1
  column_BxT = jnp.where(written_BxT, chunk.places_BxT % columns, columns)
  row_Bx1 = jnp.arange(len(x_BxGxSxK), dtype=jnp.int32)[:, None]
  at = x_BxGxSxK.at[row_Bx1, :, column_BxT]
  return at.set(new_BxTxGxK.astype(x_BxGxSxK.dtype), mode="drop")


def _joined(x_BxGxSxK: jax.Array, new_BxTxGxK: jax.Array) -> jax.Array:
  new_BxGxTxK = new_BxTxGxK.swapaxes(1, 2).astype(x_BxGxSxK.dtype)
  return jnp.concatenate([x_BxGxSxK, new_BxGxTxK], axis=2)

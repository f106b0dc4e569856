"""Layers applied one after another, in a loop or stacked and scanned."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from lorax_flax.models.remat import POLICIES
from lorax_flax.sharding import activations as spread


def policy(remat: str) -> Callable[..., Any]:
  """The policy of jax.checkpoint."""
  kept = POLICIES[remat]
  return jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=kept.device,
    names_which_can_be_offloaded=kept.host,
    offload_src="device",
    offload_dst="pinned_host",
  )


def stack(
  module: Any,
  layer: Any,
  args: Sequence[Any],
  count: int,
  x: Any,
  *shared: Any,
  each: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
  """Runs x through `count` layers; to be called from a compact method.

  The parameters are "layer_{i}/…" of each layer, or with `scan` one stacked tree under
  "layers", whose leading axis has the logical name "layers".

  Args:
    module: the caller. Its `scan` decides whether to stack the layers' parameters and
      scan; its `remat` is "none", or one of `remat.POLICIES`.
    layer: a module class whose call takes (x, *shared, **each) and returns (x, y).
    args: of its constructor.
    x: the carry: an array or a tree of arrays.
    shared: passed to every layer.
    each: arrays (count, …), or trees of them; each layer gets its own row. Of layers
      that are not scanned, a tuple of one tree for each will do.

  Returns:
    x, and the layers' own y: a tuple, or stacked as their parameters are.
  """
  each = dict(each or {})
  x = spread.shard_tokens(x)

  def run(layer, x, *shared, **own):
    x, y = layer(checkpoint_name(x, "layer"), *shared, **own)
    return spread.shard_tokens(x), y

  if module.remat != "none":
    run = nn.remat(run, policy=policy(module.remat), prevent_cse=not module.scan)
  if not module.scan:
    made = []
    for i in range(count):
      own = {name: rows[i] for name, rows in each.items()}
      x, y = run(layer(*args, name=f"layer_{i}"), x, *shared, **own)
      made.append(y)
    return x, tuple(made)

  scanned = nn.scan(
    lambda layer, x, own, *shared: run(layer, x, *shared, **own),
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=(0, *(nn.broadcast for _ in shared)),
    length=count,
    metadata_params={meta.PARTITION_NAME: "layers"},
  )
  own = jax.tree.map(jnp.asarray, each)
  return scanned(layer(*args, name="layers"), x, own, *shared)


class Stack(nn.Module):
  """`stack` as a module, under whose name the layers' parameters are.

  Attributes:
    layer, args, count, scan, remat: as `stack` takes them.
  """

  layer: Any
  args: tuple[Any, ...]
  count: int
  scan: bool
  remat: str

  @nn.compact
  def __call__(self, x: Any, *shared: Any, **each: Any) -> Any:
    return stack(self, self.layer, self.args, self.count, x, *shared, each=each)[0]

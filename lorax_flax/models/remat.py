"""Remat policies: which values of a layer are kept for the backward pass.

Layers name these values: the result of a dense layer by the logical axis of its
features ("heads", "mlp", "embed"), a layer's input "layer", and "attention" the result
and the softmax's sums that a kernel's gradient needs. A frozen kernel's gradient needs
none of them: they are the inputs of adapters, of norms and of activations.
"""

from typing import NamedTuple


class Kept(NamedTuple):
  """Names of the values that a policy keeps; all others are recomputed.

  Attributes:
    device: kept in the device's memory, beside each layer's input.
    host: kept in the host's memory, from which they come back when they are needed.
  """

  device: tuple[str, ...] = ()
  host: tuple[str, ...] = ()


_ATTENTION = ("attention", "heads", "embed")
# From the most of the device's memory to the least.
POLICIES = {
  # No product with a kernel is computed a second time.
  "inputs": Kept((*_ATTENTION, "mlp")),
  # The products into the feed-forward part are, the widest by far.
  "attention": Kept(_ATTENTION),
  # What attention and its last product give is in the host's memory, as are the layers'
  # inputs; all else is computed a second time.
  "offload_attention": Kept(host=("layer", "attention", "embed")),
  "full": Kept(),
  # The same, and each layer's input is in the host's memory.
  "offload": Kept(host=("layer",)),
}
REMAT = ("none", *POLICIES)

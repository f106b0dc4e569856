"""Memory of a language model's loss and of its gradient, compiled for a TPU.

  python -m benchmarks.token_loss [--topology=v5e:1x1] [--tokens=8192]

The loss of the tokens of one row behind the last layer, by default of Llama 3 8B's head
in bfloat16, and its gradient by the layer's outputs: of all logits at once, and in
chunks. Temporaries by the memory analysis of the TPU's own compiler, with no TPU.
"""

import argparse

import jax
import jax.numpy as jnp

from benchmarks import common
from launch.dryrun import topology
from lorax_flax.models import head as heads
from lorax_flax.train import token_scores


def compiled(device, tokens: int, features: int, vocabulary: int, room: int):
  """The compiled (kernel, x, labels) -> (loss, gradient by x)."""

  def loss(x_BxTxD, kernel_DxV, labels_BxT):
    head = heads.linear(kernel_DxV)
    scores = token_scores.token_scores(head, x_BxTxD, labels_BxT, room=room)
    return -scores.smoothed.sum()

  placed = jax.sharding.SingleDeviceSharding(device)

  def argument(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

  return (
    jax.jit(jax.value_and_grad(loss))
    .lower(
      argument((1, tokens, features), jnp.bfloat16),
      argument((features, vocabulary), jnp.bfloat16),
      argument((1, tokens), jnp.int32),
    )
    .compile()
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--topology", default="v5e:1x1")
  parser.add_argument("--tokens", type=int, default=8192)
  parser.add_argument("--features", type=int, default=4096)
  parser.add_argument("--vocabulary", type=int, default=128256)
  args = parser.parse_args()
  device = topology.describe(args.topology).devices[0]
  rows = []
  for name, room in (("at once", 2**62), ("in chunks", token_scores.room_of("tpu"))):
    program = compiled(device, args.tokens, args.features, args.vocabulary, room)
    size = program.memory_analysis().temp_size_in_bytes
    rows.append((name, f"{size / 2**20:,.1f}"))
  title = f"{args.tokens:,} tokens, {args.features:,} x {args.vocabulary:,}"
  print(common.table(title, ("loss", "temporaries, MiB"), rows))
  print(common.repeat())


if __name__ == "__main__":
  main()

"""Checks that an adapter and a base are those that a run has written and trained on.

  python -m experiments.verify --base=B --adapter=RUN/adapter

A run writes provenance.json beside its adapter: digests of every weight of its base and
of the adapter's files, plan, seed, digests of the data, versions, and logits of a fixed
probe. What holds is printed; otherwise the exit code is 1, and the message names the
file that was changed, the weights that differ, or the largest difference of the logits.

Every number of the base is read. The commands that load an adapter compare a sample of
each weight, and refuse another base unless --other_base is given.
"""

from absl import flags

from experiments.cli import command as cli
from experiments.cli import model_flags
from lorax_flax.errors import LoraxError
from lorax_flax.jobs import provenance

FLAGS = flags.FlagValues()
BASE = model_flags.base(FLAGS)
ADAPTER = model_flags.adapter(FLAGS)


def main() -> None:
  found = provenance.verify(BASE.value, ADAPTER.value)
  for line in found.holds:
    print(f"holds: {line}")
  if found.fails:
    raise LoraxError("\n".join(found.fails))


if __name__ == "__main__":
  cli.run(main, FLAGS)

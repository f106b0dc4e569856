"""Compiles a run's training step for a TPU slice that is not there; says what it costs.

  python -m launch.dryrun --config=llama3_8b_instruct.py --topology=v5e:4x4
  python -m launch.dryrun --config=… --topology=v5p:4x4x4 --config.mesh.fsdp=64
  python -m launch.dryrun --config=… --topology=v5e:4x4 --suggest --minutes=30

Needs libtpu (pip install 'lorax-flax[tpu]') and no TPU; neither weights nor examples
are read. The step is the one that experiments.run trains with, compiled by the TPU's
own compiler: memory is what it lays out, and FLOPs, memory traffic and collectives are
read from the program. The time is a roofline: the longest of what the products, the
traffic and the collectives, one after another, take at the chip's peak rates. Few steps
come near it; it is there to compare ways to run by, and names what bounds them.

Slices: v4, v5e, v5p, v6e, with the chips along each axis: v5e:16x16, v5p:4x4x8. GPUs,
for memory and collectives alone: h100:8, h100:4x8 (hosts × GPUs), by JAX's plugin for
CUDA, which needs no GPU. The exit code is 1 where the step does not fit.
"""

from pathlib import Path

from absl import flags

from experiments.cli import command as cli
from experiments.cli import config_flag
from launch.dryrun import topology as topologies
from lorax_flax.errors import LoraxError

FLAGS = flags.FlagValues()
config_flag.define(FLAGS)
TOPOLOGY = flags.DEFINE_string(
  "topology", None, "The slice: v5e:4x4, v5p:4x4x8, …", flag_values=FLAGS
)
SUGGEST = flags.DEFINE_bool(
  "suggest",
  False,
  "Try meshes, model.remat and batch sizes, and rank them.",
  flag_values=FLAGS,
)
HLO = flags.DEFINE_string(
  "hlo", None, "A file to write the program's text to.", flag_values=FLAGS
)
MINUTES = flags.DEFINE_float(
  "minutes",
  30.0,
  "With --suggest: start no other compilation after that.",
  lower_bound=0.0,
  flag_values=FLAGS,
)


def main() -> None:
  chosen = config_flag.read(FLAGS)
  if TOPOLOGY.value is None:
    kinds = ", ".join(topologies.CHIPS)
    raise LoraxError(f"which slice? --topology=v5e:4x4, say; there are {kinds}")
  settings = chosen.settings()
  topology = topologies.describe(TOPOLOGY.value)
  title = f"{chosen.spec} on {topology.name}"
  if HLO.value and not Path(HLO.value).parent.is_dir():
    raise LoraxError(f"--hlo={HLO.value}: there is no folder {Path(HLO.value).parent}")
  # Here, since --help and mistakes in flags need not wait for them.
  from launch.dryrun import single, suggest

  if SUGGEST.value:
    suggest.run(settings, topology, title, minutes=MINUTES.value)
    return
  single.run(settings, topology, title, HLO.value)


if __name__ == "__main__":
  cli.run(main, FLAGS, config_flag.help_text)

"""Compiles a run's training step for an absent TPU slice, and prints its costs.

  python -m launch.dryrun --config=llama3_8b_instruct.py --topology=v5e:4x4
  python -m launch.dryrun --config=… --topology=v5p:4x4x4 --config.mesh.fsdp=64
  python -m launch.dryrun --config=… --topology=v5e:4x4 --suggest --minutes=30

Needs libtpu (pip install 'lorax-flax[tpu]') and no TPU, and reads neither weights nor
examples. The step is the one that experiments.run trains with, compiled by the TPU's
own compiler: memory is the compiler's own sum, and FLOPs, memory traffic and
collectives are read from the compiled program. The time of a step is a roofline: the
longest of its products, its memory traffic and its collectives (one after another) at
the chip's peak rates. Real steps are slower. Use it to compare ways to run, and to see
which of the three bounds them.

Slices: v4, v5e, v5p, v6e, with the number of chips along each axis: v5e:16x16,
v5p:4x4x8. GPUs, for memory and collectives alone: h100:8, h100:4x8 (hosts × GPUs), with
JAX's CUDA plugin and no GPU. The exit code is 1 if the step does not fit.
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
  "topology", None, "The slice, such as v5e:4x4 or v5p:4x4x8.", flag_values=FLAGS
)
SUGGEST = flags.DEFINE_bool(
  "suggest",
  False,
  "Try meshes, remat policies and batch sizes, and rank them.",
  flag_values=FLAGS,
)
HLO = flags.DEFINE_string(
  "hlo", None, "A file to write the compiled program's text to.", flag_values=FLAGS
)
MINUTES = flags.DEFINE_float(
  "minutes",
  30.0,
  "With --suggest: start no further compilation after these.",
  lower_bound=0.0,
  flag_values=FLAGS,
)


def main() -> None:
  chosen = config_flag.read(FLAGS)
  if TOPOLOGY.value is None:
    kinds = ", ".join(topologies.CHIPS)
    raise LoraxError(f"--topology is missing, such as v5e:4x4; there are {kinds}")
  settings = chosen.settings()
  topology = topologies.describe(TOPOLOGY.value)
  title = f"{chosen.spec} on {topology.name}"
  if HLO.value and not Path(HLO.value).parent.is_dir():
    raise LoraxError(f"--hlo={HLO.value}: there is no folder {Path(HLO.value).parent}")
  # Imported here, so that --help and errors in flags do not wait for them.
  from launch.dryrun import run, suggest

  if SUGGEST.value:
    suggest.run(settings, topology, title, minutes=MINUTES.value)
  else:
    run.run(settings, topology, title, HLO.value)


if __name__ == "__main__":
  cli.run(main, FLAGS, config_flag.help_text)

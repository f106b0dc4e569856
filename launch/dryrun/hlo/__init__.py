"""Costs of a compiled program, read from its HLO text.

XLA's own cost analysis counts a loop's body once; here it counts once for each trip.
"""

from launch.dryrun.hlo.collectives import KINDS, Collective, collectives
from launch.dryrun.hlo.products import kernel_runs, matmul_flops
from launch.dryrun.hlo.traffic import hbm_bytes

__all__ = [
  "KINDS",
  "Collective",
  "collectives",
  "hbm_bytes",
  "kernel_runs",
  "matmul_flops",
]

"""What a compiled program costs, read from the compiler's own text of it.

XLA's cost analysis counts a loop's body once; here it counts as often as it runs.
"""

from launch.dryrun.hlo.collectives import KINDS, Collective, collectives
from launch.dryrun.hlo.products import matmul_flops
from launch.dryrun.hlo.traffic import hbm_bytes

__all__ = ["KINDS", "Collective", "collectives", "hbm_bytes", "matmul_flops"]

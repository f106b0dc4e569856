"""XLA's flags for programs that are compiled quickly and not optimised."""

from importlib import metadata

_FLAGS = {
  "xla_backend_optimization_level": "0",
  "xla_llvm_disable_expensive_passes": "true",
  "xla_cpu_parallel_codegen_split_count": "1",
}
# MLIR's emitters take most of the time that is left. The flag is gone from later
# releases, where an unknown one ends the process.
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):
  _FLAGS["xla_cpu_use_fusion_emitters"] = "false"

QUICK = " ".join(f"--{name}={value}" for name, value in _FLAGS.items())

"""Checkpoints of dequantised kernels."""

from lorax_flax.hub.checkpoints import export
from lorax_flax.models import registry


def write_dense(folder, base, name):
  """Writes a base with kernels that a format has made, dense again."""
  loaded = registry.load(base, quant=name)
  export.write_checkpoint(
    folder,
    loaded.params,
    loaded.keymap,
    loaded.hf_config,
    architecture=loaded.family.architecture,
    labels=None,
    base=base,
    overwrite=False,
  )

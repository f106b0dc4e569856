"""The devices that a program is compiled for."""

import jax

# The axes of a mesh along which the rows of a batch are sharded, where there is a mesh.
ROWS = ("data", "fsdp", "expert")
# And that along which the tokens of a row are.
TOKENS = "sequence"


def platform() -> str:
  """The platform that is compiled for: "cpu", "gpu", "tpu".

  It is that of the context's mesh, whose devices need not be of this machine.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform

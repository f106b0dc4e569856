"""The devices that a program is compiled for."""

import jax
from jax.sharding import AbstractMesh, Mesh

# The axes of a mesh along which the rows of a batch are sharded, where there is a mesh.
ROWS = ("data", "fsdp", "expert")
# And that along which the tokens of a row are.
TOKENS = "sequence"


def platform(mesh: Mesh | AbstractMesh | None = None) -> str:
  """The platform that is compiled for: "cpu", "gpu", "tpu".

  It is that of a mesh, by default the context's; its devices need not be of this
  machine.
  """
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  device = mesh.abstract_mesh.abstract_device
  return jax.default_backend() if device is None else device.platform

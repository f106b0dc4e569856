"""The cache of compiled programs for the next start."""

import jax

from lorax_flax.distributed import processes
from lorax_flax.files import bucket, workdir

# Seconds that a program takes to compile to be worth keeping. JAX's own second leaves
# out the many small programs that a start is made of.
_WORTH_KEEPING = 0.1


def use(folder: str | None) -> None:
  """Keeps compiled programs in a folder, or a bucket, from now on.

  A program that is damaged there is compiled anew; JAX warns of it.

  Args:
    folder: None leaves it to JAX_COMPILATION_CACHE_DIR.

  Raises:
    OSError, LoraxError: it can't be written to.
  """
  if folder is None:
    return
  place = bucket.folder(folder)
  if not bucket.holds(place):
    place = place.absolute()
  if processes.first():
    workdir.check_writable(place)
  jax.config.update("jax_compilation_cache_dir", str(place))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)

"""The cache of compiled programs for the next start."""

import logging

import jax

from lorax_flax.distributed import processes
from lorax_flax.files import bucket, workdir
from lorax_flax.hub import assets

log = logging.getLogger(__name__)

# Seconds that a program takes to compile to be worth keeping. JAX's own second leaves
# out the many small programs that a start is made of.
_WORTH_KEEPING = 0.1
# Bytes of our own folder, whose programs that were not used for longest give way.
_MOST_BYTES = 2 << 30


def use(folder: str | None) -> None:
  """Keeps compiled programs in a folder, or a bucket, from now on.

  JAX knows a program by its code, its devices and their versions. One that is damaged
  there is compiled anew; JAX warns of it. JAX_ENABLE_COMPILATION_CACHE=false keeps
  none.

  Args:
    folder: None is JAX_COMPILATION_CACHE_DIR, or else `programs` in the user's cache
      (`assets.cache_dir`), of at most 2 GiB, where that can be written to.

  Raises:
    OSError, LoraxError: the given folder can't be written to.
  """
  if folder is None:
    _use_own()
    return
  place = bucket.folder(folder)
  if not bucket.holds(place):
    place = place.absolute()
  if processes.first():
    workdir.check_writable(place)
  _keep(str(place), -1)


def _use_own() -> None:
  values = jax.config.values
  if values["jax_compilation_cache_dir"] or not values["jax_enable_compilation_cache"]:
    return
  place = assets.cache_dir() / "programs"
  try:
    workdir.check_writable(place)
  except OSError as error:
    log.info("compiled programs are not kept for the next start: %s", error)
    return
  _keep(str(place), _MOST_BYTES)


def _keep(place: str, most_bytes: int) -> None:
  jax.config.update("jax_compilation_cache_dir", place)
  jax.config.update("jax_compilation_cache_max_size", most_bytes)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)

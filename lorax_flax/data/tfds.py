"""Data that tensorflow-datasets has prepared, read with no TensorFlow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorax_flax.errors import LoraxError

FORMAT = "array_record"


def builder(find: Callable[[Any], Any]) -> Any:
  """A builder, without a look at the network.

  Args:
    find: (the module tensorflow_datasets) -> builder.
  """
  # Slow to import, and unused in a run without such data.
  import tensorflow_datasets as tfds

  # The default in newer releases: access to Google's bucket hangs without a network.
  tfds.core.utils.gcs_utils._is_gcs_disabled = True
  return find(tfds)


def root(data_dir: str | Path | None) -> Path | None:
  """A folder of prepared data as a builder takes it; None is TFDS's default."""
  return None if data_dir is None else Path(data_dir).expanduser()


def is_prepared(builder: Any) -> bool:
  """True where the data of a builder is in its folder."""
  return (builder.data_path / "dataset_info.json").exists()


def rows(builder: Any, name: str, advice: str) -> Callable[[str], list[Any]]:
  """(split) -> its rows, in the order of a hash, of data that is prepared.

  Args:
    name: of the data, for messages.
    advice: what to do where it is prepared in another format.
  """
  try:
    source = builder.as_data_source()
  except NotImplementedError as error:
    raise LoraxError(
      f"{name} is prepared in {builder.data_path}, but not as {FORMAT}, which is what "
      f"can be read without TensorFlow. {advice}"
    ) from error

  def read(split: str) -> list[Any]:
    if split not in source:
      raise LoraxError(f"{name} in {builder.data_path} has no split {split}")
    # All at once: one by one, each would be a read of its own.
    return source[split].__getitems__(range(len(source[split])))

  return read

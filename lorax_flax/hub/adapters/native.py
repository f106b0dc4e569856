"""Our own form of an adapter: its arrays by orbax, and a JSON of what is not an array.

A folder holds adapter.json (the LoraConfig, what each delta is, and what PEFT's config
says beside that) and arrays/, an orbax checkpoint of {path: {field: array}}. Leaves
trained in full are kept as they are now; the base's own are not. The digests of orbax's
files are kept too: it reports a damaged file in many ways, from threads of its own.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.paths import flatten
from lorax_flax.errors import LoraxError, listing, unknown
from lorax_flax.files import atomic, digests
from lorax_flax.hub import provenance
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.hub.peft.needs import Needs
from lorax_flax.methods import METHODS, Adapter, Delta, Tuned

FILE = "adapter.json"
ARRAYS = "arrays"
_FORMAT = 1
_MOST_BYTES = 64 << 20  # of adapter.json: a line or two for each delta


@dataclass(frozen=True)
class Saved:
  """An adapter, and what its folder says of it.

  Attributes:
    adapter: the deltas, by path.
    config: what they were made with.
    task_type: PEFT's name of the task.
    base_name, revision: of the base.
    labels: names of the classes.
    dtypes: of the tensors of the PEFT folder that it was read from, by key; None: of
      another form.
    untied: the base had no tied tables, or each got a weight of its own.
    problem_type: transformers', where the number of labels does not say it.
    soft: fields of the settings of trained states beside the base's weights; see
      `Needs.soft`.
  """

  adapter: Adapter
  config: LoraConfig
  task_type: str | None = None
  base_name: str | None = None
  revision: str | None = None
  labels: tuple[str, ...] | None = None
  dtypes: Mapping[str, str] | None = None
  untied: bool = False
  problem_type: str | None = None
  soft: Mapping[str, Any] | None = None


def is_ours(folder: Path) -> bool:
  """Checks whether a folder holds an adapter in this form."""
  return (folder / FILE).is_file() and (folder / ARRAYS).is_dir()


def write_adapter(
  folder: str | Path,
  saved: Saved,
  card: str | None = None,
  proof: Mapping[str, Any] | None = None,
) -> None:
  """Writes a folder, whole or not at all; an older adapter of this form is replaced.

  Args:
    card: the text of README.md.
    proof: the content of provenance.json, less what is of the folder's files.

  Raises:
    LoraxError: a folder with other things, or one that can't be written.
  """
  arrays = {path: _arrays(delta) for path, delta in saved.adapter.items()}
  about = {
    "format": _FORMAT,
    "config": dataclasses.asdict(saved.config),
    "deltas": {path: _about(delta) for path, delta in saved.adapter.items()},
    **{name: getattr(saved, name) for name in _SAID},
  }
  with atomic.new_folder(Path(folder).expanduser(), overwrite=True) as scratch:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save((scratch / ARRAYS).absolute(), arrays)
    about["files"] = digests.of_folder(scratch / ARRAYS)
    text = json.dumps(about, indent=2, sort_keys=True)
    (scratch / FILE).write_text(f"{text}\n", encoding="utf-8")
    if card is not None:
      (scratch / atomic.README).write_text(card, encoding="utf-8")
    if proof is not None:
      provenance.write(scratch, proof)


def read_adapter(folder: str | Path, params: Any) -> Saved:
  """Reads a folder that `write_adapter` wrote.

  Args:
    params: the base's tree, in the same form (layers stacked or not).

  Raises:
    LoraxError: a damaged folder, or deltas of other leaves than the base's.
  """
  folder = Path(folder).expanduser()
  about = _read(folder)
  leaves = flatten(params)
  try:
    config = LoraConfig(**{k: _frozen(v) for k, v in about["config"].items()})
    # The first version had neither untied bases nor problem types nor soft parts.
    older = {"untied": False, "problem_type": None, "soft": None}
    said = {name: _frozen({**older, **about}[name]) for name in _SAID}
    shells = {
      path: _shell(path, each, leaves) for path, each in about["deltas"].items()
    }
    files = dict(about["files"])
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise _damaged(folder / FILE, error) from error
  _check_files(folder / ARRAYS, files)
  arrays = _restore(folder / ARRAYS, {p: _arrays(s) for p, s in shells.items()})
  adapter = {p: dataclasses.replace(s, **arrays[p]) for p, s in shells.items()}
  return Saved(adapter, config, **said)


def needs(folder: str | Path, keymap: KeyMap) -> Needs:
  """Requirements of a folder for its base, whose key map this is."""
  folder = Path(folder).expanduser()
  about = _read(folder)
  try:
    deltas, (leaf,) = about["deltas"], Tuned.trained
    heads = [deltas[path] for path in keymap.label_paths if path in deltas]
    labels = int(heads[0]["arrays"][leaf][0][-1]) if heads else None
    scan = any("layers" in path.split("/") for path in deltas)
    untie = bool(about.get("untied") and keymap.ties)
    return Needs(labels, untie, scan=scan, soft=about.get("soft"))
  except (KeyError, TypeError, IndexError, ValueError) as error:
    raise _damaged(folder / FILE, error) from error


_SAID = (
  *("task_type", "base_name", "revision", "labels", "dtypes"),
  *("untied", "problem_type", "soft"),
)


def _damaged(file: Path, error: Exception) -> LoraxError:
  if isinstance(error, LoraxError):
    return LoraxError(f"{file}: {error}")
  return LoraxError(f"{file} is damaged or of another version: {error!r}")


def _read(folder: Path) -> dict[str, Any]:
  file = folder / FILE
  try:
    if file.stat().st_size > _MOST_BYTES:
      raise LoraxError(f"it is {file.stat().st_size} bytes long")
    about = json.loads(file.read_text(encoding="utf-8"))
    if about["format"] != _FORMAT:
      raise LoraxError(f"its format is {about['format']!r}; {_FORMAT} is read here")
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise _damaged(file, error) from error
  return about


def _arrays(delta: Delta) -> dict[str, Any]:
  """The leaves that are stored: those that repeat the base's are not."""
  return {n: x for n, x in delta.leaves().items() if n not in delta.from_base}


def _about(delta: Delta) -> dict[str, Any]:
  """A delta's method and static fields, and the shapes and dtypes of its arrays."""
  static = [f.name for f in dataclasses.fields(delta) if f.metadata.get("static")]
  arrays = {n: (list(x.shape), x.dtype.name) for n, x in _arrays(delta).items()}
  return {
    "method": METHODS.name_of(delta),
    "static": {name: getattr(delta, name) for name in static},
    "arrays": arrays,
  }


def _shell(path: str, about: Mapping[str, Any], leaves: Mapping[str, Any]) -> Delta:
  """A delta with shapes for arrays, checked against the base's leaf."""
  if path not in leaves:
    raise LoraxError(unknown("weight of the base", path, leaves))
  # The first version wrote the names of the classes.
  known = {method.__name__: method for method in METHODS.values()} | METHODS
  if about["method"] not in known:
    raise LoraxError(unknown("method", str(about["method"]), METHODS))
  method = known[about["method"]]
  arrays = {
    name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
    for name, (shape, dtype) in about["arrays"].items()
  }
  static = {name: _frozen(value) for name, value in about["static"].items()}
  delta = method(**arrays, **static, **dict.fromkeys(method.from_base, leaves[path]))
  delta.check(path, tuple(leaves[path].shape))
  return delta


def _check_files(folder: Path, expected: Mapping[str, Any]) -> None:
  found = digests.of_folder(folder)
  bad = [n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)]
  if bad:
    raise LoraxError(
      f"{folder} is damaged: not the files that {FILE} speaks of: {listing(bad, 4)}"
    )


def _restore(folder: Path, shapes: Mapping[str, Mapping[str, Any]]) -> Any:
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes
  )
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      stored = checkpointer.metadata(folder.absolute()).item_metadata.tree
      if _sizes(stored) != _sizes(shapes):
        raise LoraxError(f"its arrays are not those that {FILE} speaks of")
      return checkpointer.restore(folder.absolute(), like)
  except Exception as error:  # of orbax and tensorstore: of any kind
    raise LoraxError(f"cannot read {folder}: {error}") from error


def _sizes(tree: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """The shape and dtype of each array, by path and field."""
  return {
    path: {name: (tuple(x.shape), jnp.dtype(x.dtype)) for name, x in arrays.items()}
    for path, arrays in tree.items()
  }


def _frozen(value: Any) -> Any:
  """JSON's value with tuples for lists."""
  if isinstance(value, dict):
    return {name: _frozen(each) for name, each in value.items()}
  return tuple(map(_frozen, value)) if isinstance(value, list) else value

"""PEFT's adapter folders, read and written.

A folder holds adapter_config.json (config_file.py) and adapter_model.safetensors, whose
keys layout.py knows. A named adapter is in a sub-folder of its name.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.paths import flatten, map_with_path
from lorax_flax.errors import LoraxError, listing, prefixed, unknown
from lorax_flax.files import atomic, strict_json
from lorax_flax.hub import provenance
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.hub.peft import config as peft_config
from lorax_flax.hub.peft import config_file, pruned, topk
from lorax_flax.hub.peft import needs as peft_needs
from lorax_flax.hub.peft import read as peft_read
from lorax_flax.hub.peft.config import PeftConfig
from lorax_flax.hub.peft.forms import with_defaults
from lorax_flax.hub.peft.layout import Slot, layout
from lorax_flax.hub.peft.modules import of_task
from lorax_flax.hub.peft.needs import Needs
from lorax_flax.hub.peft.tensors import WEIGHTS_FILE, opened
from lorax_flax.hub.peft.translate import to_lora_config
from lorax_flax.hub.peft.write import to_peft_config, to_tensors
from lorax_flax.methods import Adapter

log = logging.getLogger(__name__)

LABELS_FILE = "labels.json"
# The adapter that PEFT keeps beside its config, not in a sub-folder.
DEFAULT = "default"


def read_adapter(
  folder: str | Path, params: Any, keymap: KeyMap, *, name: str = DEFAULT
) -> tuple[Adapter, LoraConfig]:
  """Reads a PEFT folder.

  Args:
    folder: holds adapter_config.json and adapter_model.safetensors.
    params: the base's tree, whose leaves the adapter changes; its layers stacked if
      `keymap.scan`.
    keymap: of the base.
    name: of the adapter; another than "default" is in a sub-folder of its name.

  Returns:
    The adapter, float32; and a config that describes it. Where the layers of one
    stacked leaf differ in rank, their factors are padded with zeros to the largest.

  Raises:
    LoraxError: an unsupported field; a missing, unknown or mis-shaped tensor; a damaged
      file.
  """
  folder = adapter_folder(folder, name)
  config, keymap = _read_config(folder, keymap)
  with prefixed(f"{folder}"):
    slots = layout(config, keymap)
    tensors = topk.expanded(opened(folder), config)
    tensors = pruned.expanded(tensors, pruned.rows(config, slots))
    adapter = peft_read.read(tensors, slots, config, flatten(params))
    return adapter, to_lora_config(config, keymap)


def _read_config(
  folder: Path, keymap: KeyMap, *, fresh: bool = False
) -> tuple[PeftConfig, KeyMap]:
  """The config of a folder, its defaults filled in, and the key map of its task."""
  config = config_file.read(folder, fresh=fresh)
  with prefixed(f"{folder}"):
    return with_defaults(config, keymap.family), of_task(keymap, config.task)


def with_tables(
  folder: str | Path, params: Any, keymap: KeyMap, *, name: str = DEFAULT
) -> Any:
  """The base's tree with the tables of tokens that a PEFT folder brings, as in PEFT.

  They are there where the vocabulary was resized: the new rows are in no checkpoint.
  Arguments and errors as of `read_adapter`.
  """
  folder = adapter_folder(folder, name)
  config, keymap = _read_config(folder, keymap)
  with prefixed(f"{folder}"):
    slots = layout(config, keymap)
    tables = peft_read.base_tables(opened(folder), slots, flatten(params))
  for path in tables:
    log.warning(f"{folder} brings a {path} that is not the base's: it is taken")
  return map_with_path(lambda path, leaf: tables.get(path, leaf), params)


def write_adapter(
  folder: str | Path,
  adapter: Adapter,
  keymap: KeyMap,
  config: LoraConfig,
  *,
  params: Any = None,
  base_name: str | None = None,
  revision: str | None = None,
  task_type: str | None = peft_config.SEQ_CLS,
  labels: Sequence[str] | None = None,
  problem_type: str | None = None,
  name: str = DEFAULT,
  dtypes: Mapping[str, str] | str = "float32",
  resized: bool = False,
  card: str | None = None,
  proof: Mapping[str, Any] | None = None,
) -> None:
  """Writes a PEFT folder, all of it or nothing; one that was written here is replaced.

  Args:
    folder: the destination.
    adapter: of `lora.init` or `read_adapter`.
    keymap: of the base.
    config: that the adapter was made with.
    params: the base's tree. With it, PEFT's copies of the base's own embeddings are
      written where PEFT saves them; a base whose vocabulary is unchanged needs none.
    base_name, revision: of the base: a hub name or a folder.
    task_type: PEFT's name of the task; "SEQ_CLS" saves the classifier.
    labels: names of the classes, in a small file that PEFT ignores.
    problem_type: transformers', where the number of labels does not say it; it is in
      that file.
    name: of the adapter; another than "default" goes into a sub-folder of its name.
    dtypes: of the stored tensors, one for all; or those of `stored_dtypes` of a folder
      that was read, and the same tensors are written.
    resized: the vocabulary of `params` is not the base's: all tables are written.
    card: the text of README.md.
    proof: the content of provenance.json, less what is of the folder's files.

  Raises:
    LoraxError: something that PEFT can't represent, or a folder with other files.
  """
  folder = Path(folder).expanduser()
  keymap, adapter = of_task(keymap, task_type), _in_peft(adapter)
  peft = to_peft_config(
    adapter, keymap, config, base_name=base_name, revision=revision, task_type=task_type
  )
  slots = {
    key: slot
    for key, slot in layout(peft, keymap, name).items()
    if _written(key, slot, dtypes, params is not None, resized)
  }
  leaves = {} if params is None else flatten(params)
  tensors = to_tensors(adapter, slots, peft, leaves)
  tensors = pruned.cut(tensors, pruned.rows(peft, slots))
  tensors = {key: _cast(key, value, dtypes) for key, value in tensors.items()}
  folder = folder if name == DEFAULT else folder / name
  with atomic.new_folder(folder, overwrite=True) as scratch:
    text = json.dumps(config_file.dump(peft), indent=2, sort_keys=True)
    (scratch / peft_config.CONFIG_FILE).write_text(text, encoding="utf-8")
    try:
      save_file(tensors, scratch / WEIGHTS_FILE, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
      raise LoraxError(f"cannot write {folder}: {error}") from error
    if labels is not None:
      head: Any = list(labels)
      if problem_type is not None:
        head = {"labels": head, "problem_type": problem_type}
      (scratch / LABELS_FILE).write_text(json.dumps(head), encoding="utf-8")
    if card is not None:
      (scratch / atomic.README).write_text(card, encoding="utf-8")
    if proof is not None:
      provenance.write(scratch, proof)


def from_peft(
  source: str | Path | Mapping[str, Any], keymap: KeyMap, *, name: str = DEFAULT
) -> LoraConfig:
  """Our config for one of PEFT's.

  Module names become full paths. Where layers are stacked and differ in rank or in
  alpha, or have no factors, a pattern has a value for each layer.

  Args:
    source: a PEFT folder, or the content of its adapter_config.json.
    keymap: of the base.
    name: of the adapter, as for `read_adapter`.

  Raises:
    LoraxError: an unsupported field, a name that the model doesn't have.
  """
  if isinstance(source, Mapping):
    config = config_file.parse(dict(source), fresh=True)
    config = with_defaults(config, keymap.family)
    return to_lora_config(config, of_task(keymap, config.task))
  folder = adapter_folder(source, name)
  return to_lora_config(*_read_config(folder, keymap, fresh=True))


def to_peft(
  config: LoraConfig,
  adapter: Adapter,
  keymap: KeyMap,
  *,
  base_name: str | None = None,
  revision: str | None = None,
  task_type: str | None = peft_config.SEQ_CLS,
) -> dict[str, Any]:
  """The content of adapter_config.json for an adapter; the inverse of `from_peft`.

  Args:
    config: that the adapter was made with.
    adapter: of `lora.init` or `read_adapter`; its paths are the targets.
    keymap, base_name, revision, task_type: as for `write_adapter`.

  Raises:
    LoraxError: something that PEFT can't represent.
  """
  names = {"base_name": base_name, "revision": revision, "task_type": task_type}
  keymap = of_task(keymap, task_type)
  return config_file.dump(to_peft_config(_in_peft(adapter), keymap, config, **names))


def adapter_folder(folder: str | Path, name: str = DEFAULT) -> Path:
  """The folder of an adapter: a PEFT folder itself, or its sub-folder of that name.

  Raises:
    LoraxError: no such adapter; the message lists the others.
  """
  folder = Path(folder).expanduser()
  place = folder if name == DEFAULT else folder / name
  if not folder.is_dir() or (place / peft_config.CONFIG_FILE).is_file():
    return place
  inside = folder.iterdir()
  named = sorted(e.name for e in inside if (e / peft_config.CONFIG_FILE).is_file())
  if name != DEFAULT:
    raise LoraxError(f"{folder}: {unknown('adapter', name, named)}")
  if named:
    raise LoraxError(
      f"{folder} holds no adapter itself, but in sub-folders: {listing(named)}. Give "
      "one of their names, or its folder"
    )
  return place


def stored_dtypes(folder: str | Path, *, name: str = DEFAULT) -> dict[str, str]:
  """The name of the dtype of each tensor of a PEFT folder, for `write_adapter`."""
  dtypes = opened(adapter_folder(folder, name)).dtypes
  return {key: str(dtype) for key, dtype in dtypes.items()}


def needs(folder: str | Path, keymap: KeyMap, *, name: str = DEFAULT) -> Needs:
  """Requirements of a folder for its base; arguments, errors as of `read_adapter`."""
  folder = adapter_folder(folder, name)
  config, keymap = _read_config(folder, keymap)
  with prefixed(f"{folder}"):
    return peft_needs.find(opened(folder), config, keymap)


def read_labels(folder: str | Path) -> tuple[list[str] | None, str | None]:
  """The names of the classes and the problem_type that `write_adapter` was given."""
  file = Path(folder).expanduser() / LABELS_FILE
  if not file.is_file():
    return None, None
  names, problem_type = strict_json.read(file), None
  if isinstance(names, dict) and names.keys() == {"labels", "problem_type"}:
    names, problem_type = names["labels"], str(names["problem_type"])
  if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
    raise LoraxError(f"{file} must hold a list of names, not {names!r}")
  return names, problem_type


def _in_peft(adapter: Adapter) -> Adapter:
  return {path: delta.in_peft() for path, delta in adapter.items()}


def _written(
  key: str, slot: Slot, dtypes: Mapping[str, str] | str, base: bool, resized: bool
) -> bool:
  """True where a slot has a value of its own, or was stored in the folder as read.

  Otherwise, where PEFT saves it by default; the base's weights only with a base.
  """
  if not isinstance(dtypes, str):
    return slot.status == "own" or key in dtypes
  return resized or (slot.status != "spare" and (base or slot.method is not None))


def _cast(key: str, value: np.ndarray, dtypes: Mapping[str, str] | str) -> np.ndarray:
  if not isinstance(dtypes, str):
    name = dtypes.get(key, value.dtype.name)
  else:
    name = value.dtype.name if value.dtype.kind == "i" else dtypes
  return value.astype(jnp.dtype(name))

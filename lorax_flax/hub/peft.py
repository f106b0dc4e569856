"""PEFT's adapter folders, read and written.

A folder is adapter_config.json (peft_config.py) and adapter_model.safetensors, whose
keys peft_layout.py knows. Arrays here are numpy's until the adapter is whole.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from lorax_flax import strict_json
from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.paths import flatten
from lorax_flax.errors import LoraxError, listing, nearest
from lorax_flax.hub import folders, peft_config
from lorax_flax.hub.keymap import KeyMap
from lorax_flax.hub.peft_config import PeftConfig
from lorax_flax.hub.peft_export import to_peft_config, to_tensors
from lorax_flax.hub.peft_layout import PREFIX, Slot, layout
from lorax_flax.hub.safetensors import Reader, open_file
from lorax_flax.methods import Adapter, LoRA, Tuned

WEIGHTS_FILE = "adapter_model.safetensors"
LABELS_FILE = "labels.json"


def read_adapter(
  folder: str | Path, params: Any, keymap: KeyMap
) -> tuple[Adapter, LoraConfig]:
  """Reads a PEFT folder.

  Args:
    folder: holds adapter_config.json and adapter_model.safetensors.
    params: the base's tree, whose leaves the adapter changes; its layers stacked if
      `keymap.scan`.
    keymap: of the base.

  Returns:
    The adapter, float32; and a config that describes it. Where the layers of one
    stacked leaf differ in rank, their factors are padded with zeros to the largest,
    which is what the config names; where they differ in scale, it names the first.

  Raises:
    LoraxError: a field that we cannot honour; a missing, unknown or mis-shaped
      tensor; a damaged file.
  """
  folder = Path(folder).expanduser()
  config = peft_config.read_config(folder)
  try:
    slots = layout(config, keymap)
    tensors = _load(folder / WEIGHTS_FILE, _shapes(slots, config, flatten(params)))
    adapter = _assemble(tensors, slots, config, flatten(params))
  except LoraxError as error:
    raise LoraxError(f"{folder}: {error}") from error
  return adapter, _to_lora_config(config, slots, adapter)


def write_adapter(
  folder: str | Path,
  adapter: Adapter,
  keymap: KeyMap,
  config: LoraConfig,
  *,
  base_name: str | None = None,
  revision: str | None = None,
  task_type: str | None = peft_config.SEQ_CLS,
  labels: Sequence[str] | None = None,
) -> None:
  """Writes a PEFT folder, whole or not at all; an older adapter there is replaced.

  Args:
    folder: where it shall lie.
    adapter: as `lora.init` or `read_adapter` gives it.
    keymap: of the base.
    config: what the adapter was made with.
    base_name, revision: of the base: a hub name or a folder.
    task_type: PEFT's name of the task; "SEQ_CLS" saves the classifier.
    labels: names of the classes, kept in a small file that PEFT passes over.

  Raises:
    LoraxError: something that PEFT has no form for, or a folder with other things.
  """
  peft = to_peft_config(
    adapter, keymap, config, base_name=base_name, revision=revision, task_type=task_type
  )
  tensors = to_tensors(adapter, layout(peft, keymap), peft)
  is_adapter = lambda old: (old / peft_config.CONFIG_FILE).is_file()
  with folders.writing(Path(folder).expanduser(), is_adapter) as scratch:
    text = json.dumps(peft_config.dump(peft), indent=2, sort_keys=True)
    (scratch / peft_config.CONFIG_FILE).write_text(text, encoding="utf-8")
    try:
      save_file(tensors, scratch / WEIGHTS_FILE, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
      raise LoraxError(f"cannot write {folder}: {error}") from error
    if labels is not None:
      (scratch / LABELS_FILE).write_text(json.dumps(list(labels)), encoding="utf-8")


def num_labels(folder: str | Path) -> int | None:
  """How many outputs the head has that a folder brings; None where it brings none."""
  file = _opened(Path(folder).expanduser() / WEIGHTS_FILE)
  shapes = {key: file.shape(key) for key in file}
  for end in ("classifier.out_proj.weight", "classifier.weight", "score.weight"):
    if shape := shapes.get(PREFIX + end):
      return shape[0]
  return None


def read_labels(folder: str | Path) -> list[str] | None:
  """The names of the classes that `write_adapter` was given, or None."""
  file = Path(folder).expanduser() / LABELS_FILE
  if not file.is_file():
    return None
  names = strict_json.read(file)
  if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
    raise LoraxError(f"{file} must hold a list of names, not {names!r}")
  return names


def _opened(file: Path) -> Reader:
  """A safetensors file, its header checked against its length."""
  if not file.is_file():
    hint = ""
    if file.with_suffix(".bin").is_file():
      hint = f"; {file.stem}.bin is a pickle and is not read, save as safetensors"
    raise LoraxError(f"no {file.name} in {file.parent}{hint}")
  return open_file(file)


def _shapes(
  slots: Mapping[str, Slot], config: PeftConfig, leaves: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
  """The shape of each key's tensor, by the base's leaves and the config's ranks."""
  shapes = {}
  for key, slot in slots.items():
    if slot.repeated:
      continue
    if slot.path not in leaves:
      raise LoraxError(f"the base has no {slot.path}, which {key} changes")
    shape = tuple(leaves[slot.path].shape)[0 if slot.layer is None else 1 :]
    if slot.part in ("a", "b"):
      fan_in, fan_out = shape
      rank = config.rank(slot.module)
      shape = (fan_in, rank) if slot.part == "a" else (rank, fan_out)
    shapes[key] = shape[::-1] if slot.reverse else shape
  return shapes


def _load(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """The tensors of these keys and shapes, float32; keys beside them are errors."""
  opened = _opened(file)
  found = set(opened)
  if missing := sorted(shapes.keys() - found):
    near = nearest(missing[0], found)
    raise LoraxError(
      f"{len(missing)} missing tensors in {file.name}: {listing(missing, most=4)}; "
      f"nearest to the first: {listing(near) or 'none'}"
    )
  extra = sorted(key for key in found - shapes.keys() if not _is_repeated(key))
  if extra:
    near = nearest(extra[0], shapes)
    raise LoraxError(
      f"{len(extra)} tensors in {file.name} that {peft_config.CONFIG_FILE} does not "
      f"speak of: {listing(extra, most=4)}; nearest to the first: "
      f"{listing(near) or 'none'}"
    )
  for key, shape in shapes.items():
    stored = opened.shape(key)
    if stored != shape:
      raise LoraxError(f"{key} has the shape {stored}, and {shape} was expected")
  tensors = {key: opened[key] for key in shapes}
  for key, tensor in tensors.items():
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
      raise LoraxError(f"{key} holds {tensor.dtype}, not floating-point numbers")
  return {key: tensor.astype(np.float32) for key, tensor in tensors.items()}


def _is_repeated(key: str) -> bool:
  return key.endswith(".bias") and bool(
    re.search(r"\.(modules_to_save|original_module)\.", key)
  )


def _assemble(
  tensors: Mapping[str, np.ndarray],
  slots: Mapping[str, Slot],
  config: PeftConfig,
  leaves: Mapping[str, Any],
) -> Adapter:
  """Puts the tensors into one delta a leaf, layers stacked where the leaf's are."""
  found: dict[str, dict[int | None, dict[str, Any]]] = {}
  for key, tensor in tensors.items():
    slot = slots[key]
    value = tensor.T if slot.reverse else tensor
    part = slot.part if slot.part in ("a", "b") else "value"
    layer = found.setdefault(slot.path, {}).setdefault(slot.layer, {})
    layer |= {part: value, "scale": config.scale(slot.module)}
  return {
    path: _lora(layers, leaves[path], config.lora_dropout)
    if any("a" in layer for layer in layers.values())
    else _tuned(layers, leaves[path])
    for path, layers in found.items()
  }


def _lora(layers: Mapping[int | None, Mapping[str, Any]], leaf: Any, dropout: float):
  if None in layers:
    one = layers[None]
    a, b, scale = (
      jnp.asarray(one["a"]),
      jnp.asarray(one["b"]),
      jnp.float32(one["scale"]),
    )
    return LoRA(a, b, scale, ("in", "out"), dropout)
  indices = sorted(layer for layer in layers if layer is not None)
  rank = max(layers[i]["a"].shape[-1] for i in indices)

  def stacked(part: str, axis: int):
    padded = []
    for i in indices:
      pad = [(0, 0), (0, 0)]
      pad[axis] = (0, rank - layers[i][part].shape[axis])
      padded.append(np.pad(layers[i][part], pad))
    return jnp.asarray(np.stack(padded))

  scales = np.array([layers[i]["scale"] for i in indices], np.float32)
  scale = scales[0] if (scales == scales[0]).all() else scales
  whole = len(indices) == leaf.shape[0]
  return LoRA(
    stacked("a", 1),
    stacked("b", 0),
    jnp.asarray(scale),
    ("stack", "in", "out"),
    dropout,
    None if whole else tuple(indices),
  )


def _tuned(layers: Mapping[int | None, Mapping[str, Any]], leaf: Any) -> Tuned:
  if None in layers:
    return Tuned(jnp.asarray(layers[None]["value"]), leaf)
  # A layer that the folder doesn't speak of stays the base's.
  value = np.array(leaf, np.float32)
  for layer, parts in layers.items():
    value[layer] = parts["value"]
  return Tuned(jnp.asarray(value), leaf)


def _to_lora_config(
  config: PeftConfig, slots: Mapping[str, Slot], adapter: Adapter
) -> LoraConfig:
  """What `adapt` is told to make such an adapter; paths are written out in full."""
  modules = {slot.path: slot.module for slot in reversed([*slots.values()])}
  ranks, alphas, layers = {}, {}, set()
  for path, delta in adapter.items():
    if not isinstance(delta, LoRA):
      continue
    ranks[path] = delta.rank
    alphas[path] = config.alpha(modules[path])
    layers |= set(delta.layers or ())
  saved = {slot.path for slot in slots.values() if slot.part == "saved"}
  return LoraConfig(
    targets=tuple(ranks),
    rank=config.r,
    alpha=config.lora_alpha,
    rank_pattern={re.escape(p): r for p, r in ranks.items() if r != config.r},
    alpha_pattern={
      re.escape(p): a for p, a in alphas.items() if a != config.lora_alpha
    },
    use_rslora=config.use_rslora,
    layers=tuple(sorted(layers)) or None,
    tuned=tuple(sorted(saved)),
    bias=config.bias,
    dropout=config.lora_dropout,
    init="gaussian" if config.init_lora_weights == "gaussian" else "uniform",
  )

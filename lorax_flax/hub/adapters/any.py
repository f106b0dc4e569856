"""Any adapter, whatever its form: recognised by what it holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lorax_flax.errors import LoraxError, listing
from lorax_flax.hub.adapters import gguf, loralib
from lorax_flax.hub.adapters import native as orbax_adapter
from lorax_flax.hub.adapters.native import Saved
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.hub.peft import config as peft_config
from lorax_flax.hub.peft import config_file
from lorax_flax.hub.peft import folder as peft
from lorax_flax.hub.peft.needs import Needs
from lorax_flax.methods import Tuned

Form = Literal["peft", "loralib", "orbax", "gguf"]


def form(source: str | Path) -> Form:
  """The form of a file or folder.

  Raises:
    LoraxError: none that we know; it says what is there.
  """
  source = Path(source).expanduser()
  if (source / peft_config.CONFIG_FILE).is_file():
    return "peft"
  if source.is_file() and (source.parent / peft_config.CONFIG_FILE).is_file():
    raise LoraxError(
      f"{source} is a file of a PEFT folder: give the folder, {source.parent}"
    )
  if orbax_adapter.is_ours(source):
    return "orbax"
  if gguf.is_adapter(source):
    return "gguf"
  if loralib.is_state_dict(source) or (source / loralib.FILE).is_file():
    return "loralib"
  if source.is_file():
    raise LoraxError(
      f"{source} holds no lora_A: an adapter is a PEFT folder, a folder that convert "
      "wrote, or loralib's state dict"
    )
  if not source.is_dir():
    raise LoraxError(f"no file or folder {source}")
  inside = sorted(entry.name for entry in source.iterdir())
  named = [n for n in inside if (source / n / peft_config.CONFIG_FILE).is_file()]
  if named:
    raise LoraxError(
      f"{source} holds named adapters: {listing(named)}. Give one, {source / named[0]}"
    )
  raise LoraxError(
    f"{source} holds no adapter: no {peft_config.CONFIG_FILE} (PEFT), no "
    f"{orbax_adapter.FILE} with {orbax_adapter.ARRAYS} (ours), no {loralib.FILE} "
    f"(loralib), no {gguf.FILE} (GGUF). It holds: "
    f"{listing(inside, most=12) or 'nothing'}"
  )


def read(
  source: str | Path,
  params: Any,
  keymap: KeyMap,
  *,
  heads: Mapping[str, int] | None = None,
  alpha: float | None = None,
  enable_lora: Sequence[bool] | None = None,
) -> Saved:
  """Reads an adapter of any form.

  Args:
    source: a PEFT folder, a folder of `orbax_adapter`, loralib's state dict, or a GGUF
      file.
    params: the base's tree, whose leaves the adapter changes.
    keymap: of the base.
    heads: fields of its config.json with numbers of heads, which a GGUF file's order of
      rows depends on.
    alpha, enable_lora: of a loralib file, which does not hold them.

  Raises:
    LoraxError: of no known form, damaged, or not of this base; alpha missing, or given
      where the adapter itself says it.
  """
  source, kind = Path(source).expanduser(), form(source)
  if kind == "loralib":
    if alpha is None:
      raise LoraxError(
        f"{source} is loralib's, which does not store alpha: give it (the scale is "
        "alpha / r; experiments.convert takes --alpha)"
      )
    adapter, config = loralib.read_adapter(
      _state_dict(source), params, keymap, alpha=alpha, enable_lora=enable_lora
    )
    tuned = {path for path, delta in adapter.items() if isinstance(delta, Tuned)}
    task_type = peft_config.SEQ_CLS if _brings_head(tuned, keymap) else None
    return Saved(adapter, config, task_type)
  given = {"alpha": alpha, "enable_lora": enable_lora}
  for name, value in given.items():
    if value is not None:
      raise LoraxError(f"{name} is for loralib's files, and {source} says it itself")
  if kind == "orbax":
    return orbax_adapter.read_adapter(source, params)
  if kind == "gguf":
    if heads is None:
      raise LoraxError(f"{source} is a GGUF file: give the base's numbers of heads")
    return Saved(*gguf.read_adapter(source, params, keymap, heads))
  said = config_file.read(source)
  adapter, config = peft.read_adapter(source, params, keymap)
  labels, problem_type = peft.read_labels(source)
  return Saved(
    adapter,
    config,
    said.task_type,
    said.base_model_name_or_path,
    said.revision,
    None if labels is None else tuple(labels),
    peft.stored_dtypes(source),
    problem_type=problem_type,
    soft=peft.needs(source, keymap).soft,
  )


def needs(source: str | Path, keymap: KeyMap) -> Needs:
  """Requirements of an adapter for its base, whose key map this is."""
  source, kind = Path(source).expanduser(), form(source)
  if kind == "peft":
    return peft.needs(source, keymap)
  if kind == "orbax":
    return orbax_adapter.needs(source, keymap)
  if kind == "gguf":
    return Needs()
  return Needs(loralib.num_labels(_state_dict(source), keymap))


def _state_dict(source: Path) -> Path:
  return source / loralib.FILE if source.is_dir() else source


def _brings_head(tuned: set[str], keymap: KeyMap) -> bool:
  """The classifier, all of it, is among these paths."""
  heads = [{*paths} for paths in keymap.heads.values() if keymap.label_paths & {*paths}]
  return any(head <= tuned for head in heads)

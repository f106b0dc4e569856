"""Any adapter, whatever its form: recognised by what it holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorax_flax.adapt.paths import flatten
from lorax_flax.errors import LoraxError, listing, prefixed
from lorax_flax.hub.adapters import gemma, gguf, loralib, mlx, plain, torchtune, tunix
from lorax_flax.hub.adapters import native as orbax_adapter
from lorax_flax.hub.adapters.native import Saved
from lorax_flax.hub.checkpoints.keymap import KeyMap
from lorax_flax.hub.peft import config as peft_config
from lorax_flax.hub.peft import config_file
from lorax_flax.hub.peft import folder as peft
from lorax_flax.hub.peft.needs import Needs
from lorax_flax.methods import Tuned

# Forms of plain LoRAs alone, by their names.
PLAIN: Mapping[str, plain.Form] = {
  "gemma": gemma,
  "gguf": gguf,
  "mlx": mlx,
  "torchtune": torchtune,
  "tunix": tunix,
}


def form(source: str | Path) -> str:
  """The form of a file or folder.

  Raises:
    LoraxError: none that we know; it says what is there.
  """
  source = Path(source).expanduser()
  for name, module in PLAIN.items():
    if module.is_adapter(source):
      return name
  if (source / peft_config.CONFIG_FILE).is_file():
    return "peft"
  if source.is_file() and (source.parent / peft_config.CONFIG_FILE).is_file():
    raise LoraxError(
      f"{source} is a file of a PEFT folder: give the folder, {source.parent}"
    )
  if orbax_adapter.is_ours(source):
    return "orbax"
  if loralib.is_state_dict(source) or (source / loralib.FILE).is_file():
    return "loralib"
  if source.is_file():
    raise LoraxError(
      f"{source} holds no lora_A: an adapter is a PEFT folder, a folder that convert "
      f"wrote, loralib's state dict, or a file of {_tools()}"
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
    f"(loralib), no file of {_tools()}. It holds: "
    f"{listing(inside, most=12) or 'nothing'}"
  )


def _tools() -> str:
  return ", ".join(f"{each.TOOL} ({each.FILE})" for each in PLAIN.values())


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
    source: a PEFT folder, a folder of `orbax_adapter`, loralib's state dict, or a file
      or folder of a form in `PLAIN`.
    params: the base's tree, whose leaves the adapter changes.
    keymap: of the base.
    heads: fields of its config.json with numbers of heads, which the order of rows in
      files of `PLAIN` depends on.
    alpha: of a file that does not hold it.
    enable_lora: of a loralib file, which does not hold it either.

  Raises:
    LoraxError: of no known form, damaged, or not of this base; alpha missing, or given
      where the adapter itself says it.
  """
  source, kind = Path(source).expanduser(), form(source)
  given = _given_alpha(source, kind, alpha)
  if enable_lora is not None and kind != "loralib":
    raise LoraxError(f"enable_lora is for loralib's files, and {source} is {kind}'s")
  if kind == "loralib":
    adapter, config = loralib.read_adapter(
      _state_dict(source), params, keymap, alpha=given, enable_lora=enable_lora
    )
    tuned = {path for path, delta in adapter.items() if isinstance(delta, Tuned)}
    task_type = peft_config.SEQ_CLS if _brings_head(tuned, keymap) else None
    return Saved(adapter, config, task_type)
  if kind == "orbax":
    return orbax_adapter.read_adapter(source, params)
  if kind in PLAIN:
    if heads is None:
      raise LoraxError(f"{source} is {kind}'s: give the base's numbers of heads")
    with prefixed(str(source)):
      tensors, stored = PLAIN[kind].read(source, plain.Base(keymap, heads))
      used = given if stored is None else stored
      return Saved(*loralib.of_tensors(tensors, flatten(params), keymap, used))
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


def _given_alpha(source: Path, kind: str, alpha: float | None) -> float:
  """The alpha of a file that does not hold it; 0 for one that does."""
  without = ["loralib", *(name for name, each in PLAIN.items() if not each.HAS_ALPHA)]
  if kind not in without:
    if alpha is not None:
      files = " and ".join(without)
      raise LoraxError(f"alpha is for {files} files, and {source} says it itself")
    return 0.0
  if alpha is None:
    raise LoraxError(
      f"{source} is {kind}'s, which does not store alpha: give it (the scale is "
      "alpha / r; experiments.convert takes --alpha)"
    )
  if not alpha > 0:
    raise LoraxError(f"{kind}'s alpha must be above 0, not {alpha}")
  return alpha


def needs(source: str | Path, keymap: KeyMap) -> Needs:
  """Requirements of an adapter for its base, whose key map this is."""
  source, kind = Path(source).expanduser(), form(source)
  if kind == "peft":
    return peft.needs(source, keymap)
  if kind == "orbax":
    return orbax_adapter.needs(source, keymap)
  if kind in PLAIN:
    return Needs()
  return Needs(loralib.num_labels(_state_dict(source), keymap))


def _state_dict(source: Path) -> Path:
  return source / loralib.FILE if source.is_dir() else source


def _brings_head(tuned: set[str], keymap: KeyMap) -> bool:
  """The classifier, all of it, is among these paths."""
  heads = [{*paths} for paths in keymap.heads.values() if keymap.label_paths & {*paths}]
  return any(head <= tuned for head in heads)

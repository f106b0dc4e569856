"""Local folders of models, by path, alias or name on the hub."""

from collections.abc import Mapping
from pathlib import Path

from lorax_flax.errors import LoraxError, listing, nearest
from lorax_flax.hub import assets, small_vit
from lorax_flax.hub.files import gguf_header

# Short names of assets in wheels, of a model made here, and of models on the hub.
ALIASES: Mapping[str, str] = {
  "minilm": "asset:minilm",
  "smollm2": "asset:smollm2",
  "small_vit": small_vit.NAME,
  "roberta_base": "FacebookAI/roberta-base",
  "roberta_large": "FacebookAI/roberta-large",
}

# Files that a model needs, from the top folder alone: repositories hold the same
# weights in other formats too (ONNX, TensorFlow), often larger than these.
_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
# Folders, but for one of templates.
_NOT = [f"*/{pattern}" for pattern in _PATTERNS[:-1]]
_TIMEOUT = 3.0  # seconds, for the hub's first answer


def resolve(spec: str) -> Path:
  """The folder of a model: config.json, *.safetensors and the tokenizer's files.

  A GGUF file holds all of these: the folder with it, or the file itself, will do.

  Args:
    spec: an existing folder or GGUF file; an alias (see `ALIASES`); or a name on the
      Hugging Face hub, "organisation/name". A model that was fetched once is found
      in the cache without a network.

  Raises:
    LoraxError: no such model, within seconds; or a folder that holds none.
  """
  folder = Path(spec).expanduser()
  if folder.is_dir():
    return _checked(folder)
  if gguf_header.find(folder) == folder:
    return folder
  if folder.is_file():
    raise LoraxError(
      f"{spec} is a file; a model is a folder with config.json in it, or a .gguf file"
    )
  if spec in ALIASES:
    target = ALIASES[spec]
    if target == small_vit.NAME:
      return _checked(small_vit.path())
    if target.startswith("asset:"):
      return _checked(assets.path(target.removeprefix("asset:")))
    return _from_hub(target)
  if _looks_like_a_path(spec):
    raise LoraxError(f"no folder {spec}{_beside(folder)}")
  return _from_hub(spec)


def _looks_like_a_path(spec: str) -> bool:
  return spec.startswith((".", "/", "~")) or spec.endswith("/") or spec.count("/") > 1


def _beside(folder: Path) -> str:
  """Folders with a similar name, as the end of a message."""
  parent = folder.parent
  while not parent.is_dir():
    folder, parent = parent, parent.parent
  try:
    names = [entry.name for entry in parent.iterdir() if entry.is_dir()]
  except OSError:
    return ""
  if similar := nearest(folder.name, names):
    return f"; did you mean {' or '.join(str(parent / name) for name in similar)}?"
  shown = [name for name in names if not name.startswith(".")]
  return f"; folders in {parent.resolve()}: {listing(shown, most=8) or 'none'}."


def _checked(folder: Path) -> Path:
  names = [entry.name for entry in folder.iterdir()]
  holds = f"It holds: {listing(names, most=12) or 'nothing'}"
  if "adapter_config.json" in names and "config.json" not in names:
    raise LoraxError(
      f"{folder} holds a PEFT adapter, not a model: name its base, and the adapter "
      f"beside it. {holds}"
    )
  if gguf_header.find(folder) is not None:
    return folder
  if "config.json" not in names:
    raise LoraxError(f"no config.json in {folder}: it holds no model. {holds}")
  if not any(
    name.endswith((".safetensors", ".safetensors.index.json")) for name in names
  ):
    pickled = any(name.endswith(".bin") for name in names)
    hint = "; .bin files are pickles, which are not read: save as safetensors" * pickled
    raise LoraxError(f"no weights (*.safetensors) in {folder}{hint}. {holds}")
  return folder


def _from_hub(name: str) -> Path:
  # Here, because most runs never need it and it takes half a second to import.
  import huggingface_hub as hub
  from huggingface_hub import constants, errors

  def snapshot(local_files_only: bool) -> Path:
    return Path(
      hub.snapshot_download(
        name,
        local_files_only=local_files_only,
        allow_patterns=list(_PATTERNS),
        ignore_patterns=_NOT,
      )
    )

  host = constants.ENDPOINT
  why = "HF_HUB_OFFLINE is set"
  try:
    if not constants.HF_HUB_OFFLINE:
      # This call comes first: it alone keeps to its timeout where a host is silent.
      hub.HfApi().model_info(name, timeout=_TIMEOUT)
      return _checked(snapshot(local_files_only=False))
  except errors.HFValidationError as error:
    raise LoraxError(
      f"no folder {name!r}{_beside(Path(name))} It is no valid name on the hub either; "
      f"aliases are {listing(ALIASES)}"
    ) from error
  except errors.GatedRepoError as error:
    raise LoraxError(
      f"{name} is a gated model on {host}: accept its terms there, set HF_TOKEN"
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise LoraxError(
      f"no folder {name!r} here, and no model {name!r} on {host}.{_alias_hint(name)} "
      f"Aliases are {listing(ALIASES)}"
    ) from error
  except LoraxError:
    raise
  except Exception as error:
    # The client lets errors of its HTTP library through, and that library changes.
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
  try:
    found = snapshot(local_files_only=True)
  except Exception as error:
    raise LoraxError(
      f"cannot fetch the model {name!r} from {host} ({why}), and it is neither cached "
      f"nor a folder here.{_alias_hint(name)} Without a network: a model's folder "
      "(--config.model.path=FOLDER) or minilm"
    ) from error
  return _checked(found)


def _alias_hint(name: str) -> str:
  similar = [] if name in ALIASES.values() else nearest(name, ALIASES)
  return f" Did you mean the alias {' or '.join(similar)}?" if similar else ""

"""Chat templates on disk, in each of the places where models keep theirs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_flax.data.chat import jinja
from lorax_flax.data.chat.templates import DEFAULT, ChatTemplate
from lorax_flax.errors import LoraxError, listing
from lorax_flax.files import strict_json
from lorax_flax.hub.files import gguf_header, gguf_tokenizer

_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_PROCESSOR = "chat_template.json"
_JINJA = "chat_template.jinja"
_MORE = "additional_chat_templates"
_SUFFIXES = (".jinja", ".jinja2", ".j2")


def template(
  source: str | Path | Mapping[str, Any],
  *,
  name: str | None = None,
  special_tokens: Mapping[str, str] | None = None,
) -> ChatTemplate:
  """Loads a chat template.

  Args:
    source: a model's folder (chat_template.jinja and additional_chat_templates/, else
      chat_template of tokenizer_config.json, else of a processor's chat_template.json,
      else of a GGUF file); one of these files; a .jinja file of your own; or the fields
      of a tokenizer_config.json.
    name: of one of several templates; None: as in `ChatTemplate`.
    special_tokens: variables bos_token, eos_token, … in place of the source's own.

  Raises:
    LoraxError: no template there, a file that can't be read, text that is no jinja, or
      a .jinja file that names special tokens which nothing gives.
  """
  origin, found, tokens = _find(source)
  if special_tokens is not None:
    tokens = dict(special_tokens)
  texts = _named(origin, found)
  for each, text in texts.items():
    try:
      jinja.compile_template(text)
    except LoraxError as error:
      raise LoraxError(f"{origin}: the chat template {each!r}: {error}") from error
    if tokens is None:
      _check_tokens(origin, text)
  return ChatTemplate(texts, tokens or {}, origin, name)


def of_model(folder: Path, own: str | None = None) -> ChatTemplate:
  """The chat template of a model, or a .jinja file of one's own in its place."""
  if own is None:
    return template(folder)
  return template(Path(own).expanduser(), special_tokens=special_tokens(folder))


def special_tokens(source: str | Path | Mapping[str, Any]) -> dict[str, str]:
  """The special tokens that a model's templates may name: bos_token, eos_token, ….

  Args:
    source: a model's folder, its tokenizer_config.json, a GGUF file, or the fields of a
      tokenizer_config.json.
  """
  if isinstance(source, Mapping):
    return _tokens(source)
  path = Path(source)
  if path.suffix == ".json":
    return _beside(path)
  if path.is_dir() and (found := _beside(path / _CONFIG)):
    return found
  gguf = gguf_header.find(path)
  return {} if gguf is None else _tokens(gguf_tokenizer.settings(gguf))


def _beside(file: Path) -> dict[str, str]:
  """Special tokens by the tokenizer's files in a file's folder."""
  settings = _read(file.with_name(_CONFIG))
  # As transformers: the older file wins, unless the newer one lists all tokens.
  if "added_tokens_decoder" not in settings:
    settings |= _read(file.with_name(_SPECIAL_TOKENS))
  return _tokens(settings)


def texts(folder: Path) -> dict[str, str]:
  """The templates of a model's folder or GGUF file by name; empty where it has none."""
  inside = _inside(folder)
  return {} if inside is None else _named(*inside[:2])


def _inside(path: Path) -> tuple[str, Any, dict[str, str]] | None:
  """`_find` of a model's folder or GGUF file; None where it has no template."""
  named = {file.stem: _text(file) for file in sorted((path / _MORE).glob("*.jinja"))}
  if (path / _JINJA).is_file():
    named[DEFAULT] = _text(path / _JINJA)
  if named:
    return str(path), named, special_tokens(path)
  for file in (path / _CONFIG, path / _PROCESSOR):
    if (found := _read(file).get("chat_template")) is not None:
      return str(file), found, special_tokens(path)
  gguf = gguf_header.find(path)
  settings = {} if gguf is None else gguf_tokenizer.settings(gguf)
  if (found := settings.get("chat_template")) is not None:
    return str(gguf), found, special_tokens(settings)
  return None


def _find(
  source: str | Path | Mapping[str, Any],
) -> tuple[str, Any, dict[str, str] | None]:
  """A source's name, its chat_template field, and its special tokens, if it has any."""
  if isinstance(source, Mapping):
    if (found := source.get("chat_template")) is None:
      raise LoraxError(f"no chat_template in the settings: {listing(source)}")
    return "the tokenizer's settings", found, _tokens(source)
  path = Path(source)
  if path.suffix in _SUFFIXES and path.is_file():
    return str(path), _text(path), _beside(path) or None
  if path.suffix == ".json" and path.is_file():
    if (found := strict_json.read_object(path).get("chat_template")) is None:
      raise LoraxError(f"{path} has no chat_template")
    return str(path), found, _beside(path)
  if (inside := _inside(path)) is not None:
    return inside
  there = listing(p.name for p in path.iterdir()) if path.is_dir() else ""
  raise LoraxError(
    f"no chat template in {path}: a model that is trained on chats has one in {_JINJA},"
    f" {_CONFIG} or {_PROCESSOR}, and a base model has none. Give a .jinja file of your"
    f" own. There are: {there or 'none'}"
  )


def _named(origin: str, found: Any) -> dict[str, str]:
  """Templates by name, of a chat_template field."""
  if isinstance(found, str):
    return {DEFAULT: found}
  if isinstance(found, list):
    try:
      found = {each["name"]: each["template"] for each in found}
    except (KeyError, TypeError) as error:
      raise LoraxError(
        f"{origin}: a list of chat templates has name and template in each entry; found"
        f" {found!r:.200}"
      ) from error
  if not isinstance(found, dict) or not all(
    isinstance(x, str) for item in found.items() for x in item
  ):
    raise LoraxError(f"{origin}: chat_template is no text, but {found!r:.200}")
  return found


def _tokens(settings: Mapping[str, Any]) -> dict[str, str]:
  """Special tokens of a tokenizer's settings, stored as strings or as fields."""
  more = settings.get("extra_special_tokens")
  named = {key: value for key, value in settings.items() if key.endswith("_token")}
  named |= more if isinstance(more, dict) else {}
  contents = {
    key: value.get("content") if isinstance(value, dict) else value
    for key, value in named.items()
  }
  return {key: value for key, value in contents.items() if isinstance(value, str)}


def _check_tokens(origin: str, text: str) -> None:
  """Refuses special tokens that nothing gives, since they would print as nothing."""
  if names := sorted(n for n in jinja.variables(text) if n.endswith("_token")):
    raise LoraxError(
      f"{origin} prints {listing(names)}, and no {_CONFIG} is beside it: give the"
      " model's special_tokens, or put it into the model's folder"
    )


def _read(file: Path) -> dict[str, Any]:
  return strict_json.read_object(file) if file.is_file() else {}


def _text(file: Path) -> str:
  try:
    return file.read_text("utf-8")
  except (OSError, ValueError) as error:
    raise LoraxError(f"cannot read {file}: {error}") from error

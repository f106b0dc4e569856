"""Settings of a tokenizer in a folder: class, special and added tokens, options."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from lorax_flax.errors import LoraxError
from lorax_flax.files import strict_json

# transformers' names of special tokens, in the order in which it adds them.
NAMES = tuple(
  f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
JSON = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_MOST_BYTES = 256 << 20  # of a tokenizer.json


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of a tokenizer.

  Attributes:
    class_name: transformers' class, less "Fast"; None where nothing names one.
    tokens: special tokens by name ("bos_token"); None where one is set to null.
    extra: further special tokens; None where nothing lists them.
    added: added tokens by id.
    options: the other fields of tokenizer_config.json.
    serialized: the object in tokenizer.json; None where there is no such file.
  """

  class_name: str | None
  tokens: Mapping[str, AddedToken | None]
  extra: tuple[AddedToken, ...] | None
  added: Mapping[int, AddedToken]
  options: Mapping[str, Any]
  serialized: Mapping[str, Any] | None

  def option(self, name: str, default: Any) -> Any:
    """An option's value; null is the default."""
    value = self.options.get(name)
    return default if value is None else value


def read(folder: Path, hf_config: Mapping[str, Any]) -> Settings:
  """The settings in a folder, in transformers' order of precedence.

  Args:
    hf_config: the model's config.json.

  Raises:
    LoraxError: a file that is no JSON object, or a token of a wrong form.
  """
  options = _object(folder / _CONFIG)
  serialized = _object(folder / JSON) if (folder / JSON).is_file() else None
  class_name = options.pop("tokenizer_class", None) or hf_config.get("tokenizer_class")
  decoder = options.pop("added_tokens_decoder", None)
  if decoder is None:
    options |= _object(folder / "special_tokens_map.json")
  extra = options.pop("extra_special_tokens", None) or options.pop(
    "additional_special_tokens", None
  )
  found = {
    name: None if options[name] is None else _token(name, options.pop(name))
    for name in list(options)
    if name in NAMES or (name.endswith("_token") and not _is_flag(options[name]))
  }
  if isinstance(extra, Mapping):
    found |= {name: _token(name, token) for name, token in extra.items()}
    extra = None
  if extra is not None:
    extra = tuple(_token("extra_special_tokens", token) for token in extra)
  added = _added(folder, decoder, serialized, [*found.values(), *(extra or ())])
  by_text = {token.content: token for token in added.values()}
  for name, token in found.items():
    if token is not None:
      found[name] = by_text.get(token.content, token)
  return Settings(
    None if class_name is None else str(class_name).removesuffix("Fast"),
    found,
    extra,
    added,
    options,
    serialized,
  )


def _is_flag(value: Any) -> bool:
  return value is None or isinstance(value, bool)


def _added(
  folder: Path,
  decoder: Mapping[str, Any] | None,
  serialized: Mapping[str, Any] | None,
  special: list[AddedToken | None],
) -> dict[int, AddedToken]:
  """The added tokens by id, of tokenizer_config.json or else of the older files."""
  if decoder is not None:
    return {int(i): _token(_CONFIG, token) for i, token in decoder.items()}
  texts = {token.content for token in special if token is not None}
  file = "added_tokens.json"
  found = {
    index: AddedToken(text, normalized=text not in texts, special=text in texts)
    for text, index in _object(folder / file).items()
  }
  for token in (serialized or {}).get("added_tokens", ()):
    found[token["id"]] = _token(JSON, {k: v for k, v in token.items() if k != "id"})
  return found


def _token(where: str, value: Any) -> AddedToken:
  """A token, given as its text or as an object of its fields."""
  if isinstance(value, str):
    return AddedToken(value, special=True)
  try:
    fields = {name: x for name, x in value.items() if name != "__type"}
    return AddedToken(**{"special": True, **fields})
  except (AttributeError, TypeError) as error:
    raise LoraxError(f"{where}: {value!r:.80} is no token") from error


def _object(file: Path) -> dict[str, Any]:
  if not file.is_file():
    return {}
  return strict_json.read_object(file, most_bytes=_MOST_BYTES)

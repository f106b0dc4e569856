"""A checkpoint's tokenizer, with its special tokens known."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from lorax_flax.data.tokenizers import classes
from lorax_flax.data.tokenizers import settings as settings_file
from lorax_flax.data.tokenizers.settings import JSON, NAMES, Settings
from lorax_flax.errors import LoraxError, listing, unknown
from lorax_flax.files import strict_json
from lorax_flax.hub.checkpoints import beside
from lorax_flax.hub.files import gguf_header, gguf_tokenizer


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer and what its folder says of its use.

  Attributes:
    backend: of the tokenizers library, without truncation and padding.
    special: texts of special tokens by transformers' names ("eos_token").
    truncation_side: the side at which a text that is too long is cut.
    token_types: the second text of a pair has type 1, not 0.
  """

  backend: tokenizers.Tokenizer
  special: Mapping[str, str]
  truncation_side: str = "right"
  token_types: bool = True

  def encode(
    self, text: str, pair: str | None = None, *, add_special_tokens: bool = True
  ) -> tokenizers.Encoding:
    """Ids, tokens and types of a text or of two."""
    return self.backend.encode(text, pair, add_special_tokens=add_special_tokens)

  def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """The text of ids."""
    return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

  def id_of(self, name: str) -> int | None:
    """The id of a special token by its name; None where there is none."""
    text = self.special.get(name)
    return None if text is None else self.backend.token_to_id(text)

  @property
  def pad_id(self) -> int:
    """The id of padding; 0 without such a token.

    Padding is masked, so that the value matters only to models that derive positions
    from it (RoBERTa), and these have the token.
    """
    return self.id_of("pad_token") or 0

  def truncated(self, max_length: int) -> tokenizers.Tokenizer:
    """The backend with truncation, from the longer text of a pair first."""
    made = tokenizers.Tokenizer.from_str(self.backend.to_str())
    made.encode_special_tokens = self.backend.encode_special_tokens
    made.enable_truncation(
      max_length, strategy="longest_first", direction=self.truncation_side
    )
    return made


def load(base: str | Path, adapter: str | Path | None = None) -> Tokenizer:
  """The tokenizer of a checkpoint, as transformers builds it.

  Truncation and padding in a tokenizer.json are switched off: lengths are decided by
  our config.

  Args:
    base: a folder, or a GGUF file.
    adapter: a folder; its own tokenizer, if it has one, takes the place of the base's.

  Raises:
    LoraxError: no tokenizer, a file that can't be read, or a class or setting that is
      not built here; it is named.
  """
  base = Path(base)
  config = base / "config.json"
  hf_config = strict_json.read_object(config) if config.is_file() else {}
  own = Path(adapter).expanduser() if adapter is not None else None
  folder = beside.tokenizer_folder(base, own)
  file = gguf_header.find(folder)
  if file is not None and not (folder / JSON).is_file():
    backend, special = gguf_tokenizer.load(file), gguf_tokenizer.special(file)
    return Tokenizer(backend, special)
  try:
    settings = settings_file.read(folder, hf_config)
    _refuse(folder, settings)
    return _built(folder, hf_config.get("model_type"), settings)
  except LoraxError:
    raise
  # The tokenizers library raises bare Exception for a file that it can't parse.
  except Exception as error:
    name = JSON if (folder / JSON).is_file() else "its vocabulary"
    raise LoraxError(
      f"can't read the tokenizer in {folder / name}: {error!r:.200}"
    ) from error


def _refuse(folder: Path, settings: Settings) -> None:
  """Refuses settings that would give other ids than are built here."""
  if settings.options.get("auto_map"):
    raise LoraxError(
      f"{folder}: auto_map names code of the model's own for its tokenizer, which is "
      "not run here"
    )
  if settings.options.get("fix_mistral_regex"):
    raise LoraxError(f"{folder}: fix_mistral_regex is not built here")
  side = settings.option("truncation_side", "right")
  if side not in ("left", "right"):
    raise LoraxError(f"{folder}: {unknown('truncation_side', side, ('left', 'right'))}")


def _built(folder: Path, model_type: str | None, settings: Settings) -> Tokenizer:
  name = classes.class_of(model_type, settings)
  if name == classes.SERIALIZED:
    if settings.serialized is None:
      raise _missing(folder, (JSON,))
    kind, defaults = None, {}
    backend = tokenizers.Tokenizer.from_file(str(folder / JSON))
    tokens = dict(settings.tokens)
  else:
    if name not in classes.CLASSES:
      raise LoraxError(
        f"{folder}: {unknown('tokenizer_class', name, classes.CLASSES)}. "
        '"PreTrainedTokenizerFast" reads tokenizer.json as it is'
      )
    kind = classes.CLASSES[name]
    defaults = {n: AddedToken(t, special=True) for n, t in kind.tokens.items()}
    tokens = {**defaults, **settings.tokens}
    backend = _backend(folder, name, kind, settings, _texts(tokens))
  texts = _texts(tokens)
  if kind is not None and kind.ends is not None:
    known = {token.content for token in settings.added.values()}
    ends = classes.texts_of(kind.ends(texts))
    missing = [t for t in ends - known if backend.token_to_id(t) is None]
    if missing:
      raise LoraxError(
        f"the vocabulary in {folder} has no {listing(missing)}: it can't be a {name}'s"
      )
  _add(backend, name, tokens, settings)
  _check_added(folder, backend, settings)
  _set_ends(backend, kind, texts, settings)
  backend.encode_special_tokens = settings.option("split_special_tokens", False)
  backend.no_truncation()
  backend.no_padding()
  return Tokenizer(
    backend,
    texts,
    settings.option("truncation_side", "right"),
    "token_type_ids" in settings.option("model_input_names", ("token_type_ids",)),
  )


def _texts(tokens: Mapping[str, AddedToken | None]) -> dict[str, str]:
  return {name: token.content for name, token in tokens.items() if token is not None}


def _backend(
  folder: Path,
  name: str,
  kind: classes.Class,
  settings: Settings,
  texts: Mapping[str, str],
) -> tokenizers.Tokenizer:
  """The backend of a class, without special and added tokens."""
  if settings.serialized is not None:
    vocabulary = classes.from_json(settings.serialized, name, kind.model)
  elif kind.files and all((folder / each).is_file() for each in kind.files):
    vocabulary = classes.from_files(folder, kind)
  else:
    raise _missing(folder, (JSON, *([" and ".join(kind.files)] if kind.files else [])))
  return kind.build(vocabulary, settings.option, texts)


def _missing(folder: Path, files: Sequence[str]) -> LoraxError:
  there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
  found = [name for name in there if name.endswith(".model")]
  advice = (
    f" {found[0]} is SentencePiece's and is not read; transformers makes a "
    f"{JSON} of it: AutoTokenizer.from_pretrained({str(folder)!r})"
    f".save_pretrained({str(folder)!r})."
    if found
    else ""
  )
  return LoraxError(
    f"no tokenizer in {folder}: it has not {'; or '.join(files)}.{advice} "
    f"There are: {listing(there) or 'none'}"
  )


def _add(
  backend: tokenizers.Tokenizer,
  name: str,
  tokens: Mapping[str, AddedToken | None],
  settings: Settings,
) -> None:
  """Adds the added and the special tokens, in transformers' order.

  A token of the vocabulary keeps its id; another gets the next one.
  """
  extra = settings.extra
  if extra is None and name == "T5Tokenizer":
    count = settings.option("extra_ids", 100)
    extra = tuple(AddedToken(f"<extra_id_{i}>", special=True) for i in range(count))
  there = {repr(token) for token in backend.get_added_tokens_decoder().values()}
  known = {token.content for token in backend.get_added_tokens_decoder().values()}
  special = {token.content for token in tokens.values() if token is not None}
  chosen = [
    token for _, token in sorted(settings.added.items()) if repr(token) not in there
  ]
  known |= {token.content for token in chosen}
  ordered = [tokens.get(n) for n in (*NAMES, *(n for n in tokens if n not in NAMES))]
  for token in (*ordered, *(extra or ())):
    if token is not None and token.content not in known:
      known.add(token.content)
      chosen.append(token)
  for token in chosen:
    token.special = token.special or token.content in special
  backend.add_tokens(chosen)
  if name == "Qwen2Tokenizer":
    # It adds them once more, and so none of them strips spaces.
    texts = [*special, *(token.content for token in extra or ())]
    backend.add_tokens([AddedToken(text, special=True) for text in texts])


def _check_added(
  folder: Path, backend: tokenizers.Tokenizer, settings: Settings
) -> None:
  for index, token in settings.added.items():
    found = backend.token_to_id(token.content)
    if found != index:
      raise LoraxError(
        f"{folder}: the added token {token.content!r} has the id {index}, and the "
        f"vocabulary, of {backend.get_vocab_size()} tokens, gives it {found}"
      )


def _set_ends(
  backend: tokenizers.Tokenizer,
  kind: classes.Class | None,
  texts: Mapping[str, str],
  settings: Settings,
) -> None:
  """Sets the special tokens around a text."""
  if kind is not None and kind.ends is not None:
    backend.post_processor = classes.template(kind.ends(texts), backend)
    return
  if settings.serialized is not None and settings.serialized.get("post_processor"):
    if kind is not None:
      backend.post_processor = classes.post_processor(settings.serialized)
    return
  # transformers heeds these two only where there is no tokenizer.json.
  flags: Any = settings.option if settings.serialized is None else lambda _, no: no
  bos, eos = (
    [texts[f"{end}_token"]]
    if flags(f"add_{end}_token", False) and f"{end}_token" in texts
    else []
    for end in ("bos", "eos")
  )
  single = [*bos, "$A", *eos]
  second = [f"{token}:1" for token in bos], [f"{token}:1" for token in eos]
  pair = [*single, *second[0], "$B:1", *second[1]]
  backend.post_processor = classes.template((single, pair), backend)

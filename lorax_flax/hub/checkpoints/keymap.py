"""A family's names in a Hugging Face checkpoint, as a table.

A key map pairs our leaf paths ("encoder/layer_{i}/attention/query/kernel") with
checkpoint keys ("encoder.layer.{i}.attention.self.query.weight"). It reads and
writes checkpoints, and it translates the module names of PEFT into our paths.

Keys come in two forms. A *bare* key has no prefix ("encoder.layer.0. …"): the table is
written in these, and any stored prefix is stripped. A *full* key is that of the model
in transformers and in PEFT ("bert.encoder.layer.0. …", but "classifier.weight"), and is
written, unless files keep another name.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lorax_flax.errors import LoraxError, check_known, listing, unknown
from lorax_flax.hub.checkpoints.entries import Entry, Kind, Site, kind, placeholders


@dataclasses.dataclass(frozen=True)
class KeyMap:
  """The table of one model: a family's entries, and how often it repeats them.

  Attributes:
    family: for messages.
    prefix: of the body's full keys, with its dot ("bert.").
    entries: the table.
    counts: the range of each placeholder: {"i": 12} for twelve layers.
    scan: our tree holds the layers stacked, under "layers", instead of "layer_{i}".
    anchor: a bare key that every checkpoint has; it shows the stored prefix.
    buffers: bare keys that hold no weights and are ignored.
    other_heads: bare keys of other tasks' heads; ignored, and reported.
    head_groups: first names of our paths ("classifier", "pooler"). A checkpoint may
      lack all leaves of a group, which are freshly initialised then.
    aliases: (old ending, new ending) of bare keys, for old checkpoints.
    ties: bare keys that repeat another key's weight ("lm_head.weight" of a tied head),
      to that other key.
    unused: a bare key of these others whose module the model does not call.
    taken_for_tied: a bare key of its own weight that PEFT takes for a tied one.
    other_form: a map of the same leaves to keys that some files have instead; it is
      read, and not written.
    on_disk: modules that transformers has renamed: the entry's module to the one that
      checkpoints still have.
  """

  family: str
  prefix: str
  entries: tuple[Entry, ...]
  counts: Mapping[str, int]
  scan: bool
  anchor: str
  buffers: tuple[str, ...] = ()
  other_heads: tuple[str, ...] = ()
  head_groups: tuple[str, ...] = ()
  aliases: tuple[tuple[str, str], ...] = ()
  ties: Mapping[str, str] = dataclasses.field(default_factory=dict)
  unused: str | None = None
  taken_for_tied: str | None = None
  on_disk: Mapping[str, str] = dataclasses.field(default_factory=dict)
  other_form: "KeyMap | None" = None

  @functools.cached_property
  def sites(self) -> dict[str, Site]:
    """Every bare key of this model, layers written out."""
    sites = {}
    for entry in self.entries:
      for values in self._numbers(entry):
        sites[entry.key.format(**values)] = self._site(entry, values)
    return sites

  def _numbers(self, entry: Entry) -> Iterator[dict[str, int]]:
    """Every combination of values of an entry's placeholders."""
    names = placeholders(entry.key)
    for numbers in itertools.product(*(range(self.counts[name]) for name in names)):
      yield dict(zip(names, numbers, strict=True))

  def _site(self, entry: Entry, values: Mapping[str, int]) -> Site:
    path, index = entry.path, []
    for name, number in values.items():
      layer = f"layer_{{{name}}}"
      # A placeholder that our path lacks is an axis of the leaf, as experts are.
      if layer in path and not self.scan:
        path = path.replace(layer, f"layer_{number}")
      else:
        path = path.replace(layer, "layers")
        index.append(number)
    return Site(path, tuple(index), entry)

  @functools.cached_property
  def keys(self) -> dict[str, list[str]]:
    """Bare keys of each path of our tree; more than one where they are stacked."""
    keys: dict[str, list[str]] = {}
    for key, site in self.sites.items():
      keys.setdefault(site.path, []).append(key)
    return keys

  @functools.cached_property
  def stored(self) -> dict[str, str]:
    """The bare key in files, for each bare key that differs from it."""
    found = {}
    for entry in self.entries:
      module, _, leaf = entry.key.rpartition(".")
      if module in self.on_disk:
        for values in self._numbers(entry):
          key = f"{self.on_disk[module]}.{leaf}".format(**values)
          found[entry.key.format(**values)] = key
    return found

  @functools.cached_property
  def renamed(self) -> dict[str, str]:
    """The inverse of `stored`."""
    return {old: new for new, old in self.stored.items()}

  @functools.cached_property
  def heads(self) -> dict[str, list[str]]:
    """Paths of each of the `head_groups`."""
    return {
      group: [path for path in self.keys if path.split("/")[0] == group]
      for group in self.head_groups
    }

  @functools.cached_property
  def label_paths(self) -> frozenset[str]:
    """Paths of the leaves whose last axis is the labels'; none in a language model."""
    return frozenset(site.path for site in self.sites.values() if site.entry.labels)

  @functools.cached_property
  def leaves(self) -> dict[str, str]:
    """The main bare key of each bare module: its weight, not its bias."""
    return {module_of(key): key for key in self.sites if key.endswith(".weight")}


def module_of(key: str) -> str:
  """The module that a key's tensor belongs to: the key less its last name."""
  return key.rpartition(".")[0]


def full_key(keymap: KeyMap, bare: str) -> str:
  """The key in transformers' model: the body's keys get the prefix."""
  return _prefix(keymap, bare) + bare


def file_key(keymap: KeyMap, bare: str) -> str:
  """The key in a checkpoint that transformers writes."""
  return _prefix(keymap, bare) + keymap.stored.get(bare, bare)


def _prefix(keymap: KeyMap, bare: str) -> str:
  return keymap.prefix if keymap.sites[bare].entry.part == "body" else ""


def path_to_keys(keymap: KeyMap, path: str) -> list[str]:
  """Full checkpoint keys of one of our leaf paths, one a layer where it is stacked.

  "encoder/layer_0/attention/query/bias" gives
  ["bert.encoder.layer.0.attention.self.query.bias"]. Unknown path: LoraxError.
  """
  check_known(f"{keymap.family} parameter", path, keymap.keys)
  return [full_key(keymap, key) for key in keymap.keys[path]]


def path_to_modules(keymap: KeyMap, path: str) -> list[str]:
  """Full module names of one of our leaf paths, one a layer where it is stacked.

  "encoder/layers/attention/query/kernel" gives
  ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1. …", …].
  Unknown path: LoraxError.
  """
  return [module_of(key) for key in path_to_keys(keymap, path)]


def bare_key(keymap: KeyMap, key: str) -> str:
  """A full or bare key without the family's prefix, old names made new."""
  return _renew(keymap, key.removeprefix(keymap.prefix))


def _renew(keymap: KeyMap, bare: str) -> str:
  for old, new in keymap.aliases:
    if bare.endswith(old):
      return bare.removesuffix(old) + new
  return keymap.renamed.get(bare, bare)


def key_to_path(keymap: KeyMap, key: str) -> tuple[str, int | None]:
  """The path of a checkpoint key, full or bare, and its layer where stacked.

  "bert.encoder.layer.3.attention.self.query.bias" gives
  ("encoder/layer_3/attention/query/bias", None), or where layers are scanned
  ("encoder/layers/attention/query/bias", 3). Unknown key: LoraxError.
  """
  bare = bare_key(keymap, key)
  if bare not in keymap.sites:
    options = [full_key(keymap, each) for each in keymap.sites]
    raise LoraxError(unknown(f"{keymap.family} checkpoint key", key, options))
  site = keymap.sites[bare]
  return site.path, site.layer


def module_to_path(keymap: KeyMap, name: str) -> tuple[str, int | None]:
  """The path of a module's weight, and its layer where stacked.

  "bert.encoder.layer.3.attention.self.query", with the prefix or without it, gives
  ("encoder/layer_3/attention/query/kernel", None), or where layers are scanned
  ("encoder/layers/attention/query/kernel", 3). A module without a weight of its own
  (or an unknown one): LoraxError.
  """
  bare = name.removeprefix(keymap.prefix)
  if bare not in keymap.leaves:
    raise LoraxError(unknown(f"{keymap.family} module", name, modules(keymap)))
  return key_to_path(keymap, keymap.leaves[bare])


def modules(keymap: KeyMap) -> dict[str, Kind]:
  """Full names of all modules that own a weight, in the table's order, and kinds.

  PEFT matches its target_modules against these.
  """
  return {
    module_of(full_key(keymap, key)): kind(keymap.sites[key].entry)
    for key in keymap.leaves.values()
  }


def num_labels(keymap: KeyMap, shapes: Mapping[str, Sequence[int]]) -> int | None:
  """The number of labels by the shapes of stored tensors, torch's (labels, in).

  Args:
    shapes: by full key; those of the head may be missing.

  Returns:
    None without a head among them, or for a model without labels.
  """
  for bare, site in keymap.sites.items():
    if site.entry.labels and (shape := shapes.get(full_key(keymap, bare))):
      return shape[0]
  return None


def bare_keys(keymap: KeyMap, stored: Iterable[str]) -> dict[str, str]:
  """Bare keys of a checkpoint's stored keys: bare key to stored key.

  The body's prefix ("", "bert.", "model.bert.") is what precedes the anchor key; a part
  of it before the family's own prefix ("model.") also precedes the heads.

  Raises:
    LoraxError: no anchor, two prefixes, or two stored keys for one bare key.
  """
  stored = list(stored)
  inner = _stored_prefix(keymap, stored)
  outer = inner.removesuffix(keymap.prefix)
  bare: dict[str, str] = {}
  for key in stored:
    used = next((each for each in (inner, outer) if key.startswith(each)), "")
    name = _renew(keymap, key.removeprefix(used))
    if name in bare:
      raise LoraxError(
        f"checkpoint has the {keymap.family} weight {name!r} twice: "
        f"as {bare[name]!r} and as {key!r}"
      )
    bare[name] = key
  return bare


def as_stored(keymap: KeyMap, stored: Iterable[str]) -> KeyMap:
  """The key map, or its other form where a checkpoint has any of that one's keys."""
  other = keymap.other_form
  if other is None:
    return keymap
  own = other.sites.keys() - keymap.sites.keys()
  return keymap if own.isdisjoint(bare_keys(keymap, stored)) else other


def _stored_prefix(keymap: KeyMap, stored: Sequence[str]) -> str:
  found = [
    key.removesuffix(keymap.anchor)
    for key in stored
    if re.search(rf"(^|\.){re.escape(keymap.anchor)}$", key)
  ]
  if not found:
    raise LoraxError(
      f"no {keymap.family} checkpoint: missing key {keymap.anchor!r} (under any "
      f"prefix). There are: {listing(stored) or 'none'}"
    )
  if len(found) > 1:
    raise LoraxError(
      f"checkpoint holds more than one {keymap.family} model, under the prefixes "
      f"{listing(map(repr, found))}"
    )
  return found[0]

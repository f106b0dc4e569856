"""The tensors of a PEFT folder, for a config and a model.

Reading and writing both follow `layout`, so neither knows a key that the other doesn't.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lorax_flax.errors import LoraxError, listing, nearest, unknown
from lorax_flax.hub.checkpoints.entries import Site
from lorax_flax.hub.checkpoints.keymap import KeyMap, module_of
from lorax_flax.hub.peft import config as peft_config
from lorax_flax.hub.peft import soft
from lorax_flax.hub.peft.config import PeftConfig
from lorax_flax.hub.peft.forms import (
  ROLES,
  alone,
  form_of,
  keys_of,
  method_of,
  options_of,
  soft_form_of,
)
from lorax_flax.hub.peft.modules import (
  ADAPTABLE,
  HEAD,
  Place,
  all_linear,
  input_embedding,
  module_names,
  parameters,
  places,
  tensors,
  tied_to,
)
from lorax_flax.methods import Delta, Rows, Tuned
from lorax_flax.methods.peft_form import AS_IS, Form

_SHARED_PREFIX = "base_model."
PREFIX = f"{_SHARED_PREFIX}model."
# PEFT's modules around a table that has factors, trained rows, or is saved in full.
_FACTORED, _WITH_ROWS = "base_layer.", "token_adapter.base_layer."
_ORIGINAL, _SAVED = "original_module.", "modules_to_save."
WRAPPERS = ("", _FACTORED, _WITH_ROWS, _ORIGINAL, _SAVED)
Status = Literal["own", "shared", "copy", "spare", "echo"]


@dataclass(frozen=True)
class Slot:
  """One tensor of a folder.

  Attributes:
    site: our leaf of the base, and where in it.
    method: of the leaf's delta; None of a tensor that repeats the base's own leaf.
    leaf: the delta's leaf that the tensor is.
    module: PEFT's name of the module or parameter that the config speaks of.
    form: how the tensor's axes are ours. Of a leaf trained in full, its row says it.
    roles: of the axes of one layer of the base's leaf.
    rows: of trained rows, their numbers.
    status: "own" says what no other tensor says; "shared" says it for all targets,
      whose leaves are its first parts, and the slot is of the first of them; "copy"
      must be equal to another or to the base; "spare" is a copy that PEFT saves only
      where it is asked to; "echo" is one that nothing depends on, and is passed over.
  """

  site: Site
  method: type[Delta] | None
  leaf: str
  module: str
  form: Form = AS_IS
  roles: tuple[str, ...] = ()
  rows: tuple[int, ...] = ()
  status: Status = "own"

  @property
  def path(self) -> str:
    return self.site.path


@dataclass(frozen=True)
class Targets:
  """The modules and parameters that a config means.

  Attributes:
    modules: those that get factors.
    tied: those that share an embedding's weight, and its factors.
    parameters: the full keys of parameters that get factors.
    saved: modules saved in full; of a container, not what it holds.
  """

  modules: tuple[str, ...]
  tied: tuple[str, ...]
  parameters: tuple[str, ...]
  saved: tuple[str, ...]


class Tied(LoraxError):
  """An adapter that changes the uses of a tied weight apart."""


def resolve(config: PeftConfig, keymap: KeyMap, found: Mapping[str, Place]) -> Targets:
  """The modules that a config names, by PEFT's rules.

  Raises:
    LoraxError: a name that this model doesn't have.
    Tied: one of two uses of a weight, or each apart.
  """
  names = module_names(keymap)
  tied = [name for name, place in found.items() if place.main is not None]
  of_embedding = [] if not tied else tied_to(found, input_embedding(found))
  _check_saved(config, names)
  saved = config.saved(names)
  if of_embedding and config.ties_saved():
    for name in of_embedding:
      if found[name].kind != "turned":
        raise LoraxError(
          f"PEFT's ensure_weight_tying puts a linear layer in the place of {name}, an "
          f"embedding, and then fails: {input_embedding(found)} cannot be saved in full"
        )
    saved = list(dict.fromkeys([*saved, input_embedding(found), *of_embedding]))
  inside = [n for n in found if any(n == s or n.startswith(f"{s}.") for s in saved)]
  is_classifier = config.task_type == peft_config.SEQ_CLS
  modules = config.targets(all_linear(found, names, is_classifier), names)
  shared: list[str] = []
  if of_embedding and config.ties_targets():
    main = input_embedding(found)
    modules = [*(m for m in modules if m not in (*of_embedding, main)), main]
    shared = of_embedding
  known = parameters(keymap)
  named = [key for key in known if config.is_parameter(key)]
  # The rows of a table are those of every module that shares it.
  factored = () if alone(config.peft_type) else (*modules, *shared)
  for names_changed in (inside, factored, [*map(module_of, named)]):
    _check_uses(names_changed, found, keymap)
  for end in config.target_parameters or ():
    if not any(key == end or key.endswith(f".{end}") for key in named):
      raise LoraxError(
        f"{peft_config.CONFIG_FILE}: {unknown('target parameter', end, known)}"
      )
  if not modules and not named and soft_form_of(config) is None:
    kinds = {name: place.kind for name, place in found.items()}
    raise LoraxError(peft_config.describe_unknown_target(config, kinds))
  return Targets(tuple(modules), tuple(shared), tuple(named), tuple(saved))


def layout(
  config: PeftConfig, keymap: KeyMap, adapter_name: str = "default"
) -> dict[str, Slot]:
  """Every key of the folder of `config`, with its tensor's slot.

  Raises:
    LoraxError: a target that this model doesn't have, or that PEFT or we have no form
      for; a module to save that it doesn't have.
  """
  found = places(keymap)
  targets = resolve(config, keymap, found)
  if (form := soft_form_of(config)) is not None:
    (leaf,) = Tuned.trained
    own = Slot(form.site, Tuned, leaf, "", form.form(config.options))
    saved = _saved(config, keymap, targets, found, adapter_name)
    return {soft.KEY: own} | {prefix(config) + key: x for key, x in saved.items()}
  slots = _alone(config, keymap, targets, found)
  for module in () if alone(config.peft_type) else targets.modules:
    place = _adaptable(module, found)
    slots |= _factors(config, module, module, place, "own")
  for module in targets.tied:
    if config.use_dora:
      raise LoraxError(
        f"{peft_config.CONFIG_FILE}: use_dora with ensure_weight_tying gives {module} "
        f"and {found[module].main} a magnitude each, and they share one weight here"
      )
    if config.scale(module) != config.scale(str(found[module].main)):
      raise LoraxError(
        f"{peft_config.CONFIG_FILE}: {module} and {found[module].main} share a weight, "
        "and rank_pattern or alpha_pattern scale its deltas differently"
      )
    slots |= _factors(config, module, module, found[module], "copy")
  slots |= dict(_parameter_slots(config, keymap, targets))
  slots |= _rows(config, keymap, targets, found)
  slots |= _saved(config, keymap, targets, found, adapter_name)
  slots |= _biases(config, keymap, targets, slots)
  slots = dict(_embeddings(config, keymap, targets, found, slots)) | slots
  _check_once(slots)
  return _shared(config, slots) | {PREFIX + key: slot for key, slot in slots.items()}


def _alone(
  config: PeftConfig, keymap: KeyMap, targets: Targets, found: Mapping[str, Place]
) -> dict[str, Slot]:
  """The slots of the targets of a type in which no kernel has a delta."""
  method = alone(config.peft_type)
  slots: dict[str, Slot] = {}
  for module in targets.modules if method is Tuned else ():
    keys = form_of(config.peft_type).keys.get(found[module].kind)
    if keys is None:
      raise LoraxError(
        f"PEFT's {config.peft_type} is read here for norms, and {module} is a "
        f"{found[module].kind}: train it in full (modules_to_save)"
      )
    (wrapper,) = keys
    for key, site in tensors(keymap).items():
      if module_of(key) == module:
        end = key.removeprefix(module)
        slots[f"{module}.{wrapper}{end}"] = _in_full(site, module, site.entry.form)
  return slots


def prefix(config: PeftConfig) -> str:
  """The beginning of the keys: PEFT wraps the base's modules for deltas alone."""
  return PREFIX if soft_form_of(config) is None else soft.PREFIX


def _shared(config: PeftConfig, slots: Mapping[str, Slot]) -> dict[str, Slot]:
  """The slots of the tensors that all targets share."""
  is_own = lambda slot: slot.status == "own" and slot.method is method_of(config)
  return {
    _SHARED_PREFIX + end: replace(
      next(filter(is_own, slots.values())), leaf=leaf, form=form, status="shared"
    )
    for end, (leaf, form) in form_of(config.peft_type).shared.items()
  }


def _adaptable(module: str, found: Mapping[str, Place]) -> Place:
  kind = found[module].kind if module in found else "container"
  if kind not in (*ADAPTABLE, "turned"):
    raise LoraxError(
      f"target_modules name {module}, which is no linear layer, no embedding and no "
      f"convolution, but a {kind}"
    )
  place = found[module]
  if place.main is not None:
    raise Tied(_untie(module, [place.main]))
  if place.site.entry.piece != (0, 1):
    raise LoraxError(
      f"target_modules name {module}, whose weight is stored beside others in "
      f"{place.site.path}"
    )
  return place


def _factors(
  config: PeftConfig, module: str, key: str, place: Place, status: Status
) -> dict[str, Slot]:
  """The slots of one module's factors, under `key`."""
  method = method_of(config)
  options = options_of(config, module)
  keys = keys_of(method, place.kind, config.rank(module), options)
  if keys is None:
    name = (method.peft and method.peft.flag) or config.peft_type
    raise LoraxError(f"PEFT has no {name} for {place.kind}s, and {module} is one")
  slots = {
    f"{key}.{end}": Slot(
      place.site, method, leaf, module, form, ROLES[place.kind], status=status
    )
    for end, (leaf, form) in keys.items()
  }
  own = form_of(config.peft_type)
  if own.repeats_shared:
    (first, *_) = slots.values()
    slots |= {
      f"{key}.{end}": replace(first, leaf=leaf, form=form, status="shared")
      for end, (leaf, form) in own.shared.items()
    }
  return slots


def _check_uses(
  names: Sequence[str], found: Mapping[str, Place], keymap: KeyMap
) -> None:
  """Refuses what changes one use of a shared weight and not the others."""
  groups = {}
  for name in {*names} & found.keys():
    main = found[name].main or name
    groups[name] = {main, *tied_to(found, main)} - {*names}
  unused = module_of(keymap.unused or "")
  if groups.get(unused):
    raise LoraxError(
      f"{peft_config.CONFIG_FILE}: without ensure_weight_tying PEFT changes {unused} "
      f"alone, and a {keymap.family} does not use it: such an adapter does nothing "
      f"there. It uses {listing(tied_to(found, unused))}, which may be named instead"
    )
  for name, left in groups.items():
    if left:
      raise Tied(_untie(name, left))


def _untie(name: str, others: Iterable[str]) -> str:
  return (
    f"{peft_config.CONFIG_FILE}: {name} shares its weight with {listing(others)}, and "
    "without ensure_weight_tying PEFT changes it for one of them alone, or for each "
    "apart. That needs a base with two weights: load it with untie=True"
  )


def _parameter_slots(
  config: PeftConfig, keymap: KeyMap, targets: Targets
) -> Iterator[tuple[str, Slot]]:
  """Slots of target_parameters: several of one module nest, the first innermost."""
  known = parameters(keymap)
  by_module: dict[str, list[str]] = {}
  for key in targets.parameters:
    by_module.setdefault(module_of(key), []).append(key)
  for module, keys in by_module.items():
    if module in targets.modules:
      raise LoraxError(f"{module} is among target_modules and target_parameters both")
    for depth, key in enumerate(reversed(keys)):
      wrapper = module + ".base_layer" * depth
      yield from _factors(config, key, wrapper, known[key], "own").items()


def _check_taken_for_tied(keymap: KeyMap, main: str) -> None:
  """Refuses what PEFT would do to a weight that it takes for tied and that isn't."""
  if keymap.taken_for_tied is not None:
    raise LoraxError(
      f"{keymap.taken_for_tied} of this base is a weight of its own, and PEFT under "
      f"transformers 5, which calls every {keymap.family} tied, puts what is trained "
      f"of {main} into it too, while under transformers 4 it does not: what such an "
      "adapter means depends on the version that made it. Train the module in full "
      "(modules_to_save) or its factors (target_modules) instead"
    )


def _rows(
  config: PeftConfig, keymap: KeyMap, targets: Targets, found: Mapping[str, Place]
) -> dict[str, Slot]:
  """Slots of trainable_token_indices; of the targets, in a type of their own."""
  tokens = config.trainable_token_indices
  if tokens is None:
    return {}
  main = input_embedding(found)
  _check_taken_for_tied(keymap, main)
  is_alone = alone(config.peft_type) is not None
  form = form_of(config.peft_type) if is_alone else Rows.peft
  tables = targets.modules if is_alone else (main,)
  ends = tokens if isinstance(tokens, Mapping) else dict.fromkeys(tables, tokens)
  rows: dict[str, tuple[int, ...]] = {}
  for end, numbers in ends.items():
    hits = [name for name in found if name.endswith(end)]
    if not hits:
      raise LoraxError(
        f"{peft_config.CONFIG_FILE}: trainable_token_indices: "
        f"{unknown('module', end, found)}"
      )
    rows |= dict.fromkeys(hits, numbers)
  shared = tied_to(found, main)
  if main in rows and all(rows.get(name, rows[main]) == rows[main] for name in shared):
    # The embedding's own rows are those of every module that shares its weight.
    rows = {name: n for name, n in rows.items() if name not in shared}
  elif set(rows) & {main, *shared} and shared:
    raise Tied(
      f"{peft_config.CONFIG_FILE}: trainable_token_indices differ between {main} and "
      f"{listing(shared)}, which share one weight. That needs a base with two: load it "
      "with untie=True"
    )
  slots = {}
  for name, numbers in rows.items():
    place = found[name]
    if place.kind not in ("embedding", "linear"):
      raise LoraxError(f"trainable_token_indices name {name}, a {place.kind}")
    for end, (leaf, kept) in form.keys[place.kind].items():
      slots[f"{name}.{end}"] = Slot(
        place.site, Rows, leaf, name, kept, ROLES[place.kind], numbers
      )
  return slots


def _saved(
  config: PeftConfig,
  keymap: KeyMap,
  targets: Targets,
  found: Mapping[str, Place],
  adapter_name: str,
) -> dict[str, Slot]:
  """Slots of modules_to_save."""
  known = tensors(keymap)
  slots = {}
  for module in targets.saved:
    if module in found and found[module].main is not None:
      site = found[module].site
      slots[f"{module}.weight"] = _in_full(site, module, status="copy")
      continue
    inside = {k: s for k, s in known.items() if k.startswith(f"{module}.")}
    for key, site in inside.items():
      slots[key] = _in_full(site, module, site.entry.form)
      if config.bias == "all" and key.endswith(".bias"):
        inner = key.removeprefix(f"{module}.")
        slots |= _wrapped_biases(inner, slots[key], adapter_name)
  return slots


def _wrapped_biases(inner: str, slot: Slot, adapter_name: str) -> dict[str, Slot]:
  """The keys that bias="all" adds for a bias of a saved module.

  PEFT takes every key that ends with ".bias", so those inside its own wrapper too;
  then it takes the adapter's name off where that is next to last.
  """
  name = "" if inner == "bias" else f"{adapter_name}."
  infix = {"modules_to_save": name, "original_module": ""}
  return {
    f"{slot.module}.{wrapper}.{infix[wrapper]}{inner}": Slot(
      slot.site, Tuned, leaf, slot.module, form, status="echo"
    )
    for wrapper, (leaf, form) in Tuned.peft.keys["wrapped"].items()
  }


def _in_full(
  site: Site, module: str, form: Form = AS_IS, status: Status = "own"
) -> Slot:
  """The slot of a leaf that is trained in full."""
  (leaf,) = Tuned.trained
  return Slot(site, Tuned, leaf, module, form, status=status)


def _check_saved(config: PeftConfig, names: Iterable[str]) -> None:
  for end in config.modules_to_save or ():
    # PEFT lists both names that a head may have; a model has one of them.
    if end in peft_config.HEAD_NAMES or any(name.endswith(end) for name in names):
      continue
    near = nearest(end, {name.rpartition(".")[2] for name in names})
    raise LoraxError(
      f"modules_to_save names {end!r}, and this model has no such module; nearest: "
      f"{listing(near) or 'none'}"
    )


def _biases(
  config: PeftConfig, keymap: KeyMap, targets: Targets, saved: Mapping[str, Slot]
) -> dict[str, Slot]:
  """Slots of the biases that `config.bias` trains."""
  slots: dict[str, Slot] = {}
  if config.bias == "none":
    return slots
  wrapped = {*targets.modules, *map(module_of, targets.parameters)}
  for key, site in tensors(keymap).items():
    module = module_of(key)
    if not key.endswith(".bias") or key in saved:
      continue
    if module in wrapped:
      # PEFT wraps a target: its own weights move under base_layer.
      key = f"{module}.base_layer.bias"
    elif config.bias == "lora_only":
      continue
    slots[key] = _in_full(site, module)
  return slots


def _embeddings(
  config: PeftConfig,
  keymap: KeyMap,
  targets: Targets,
  found: Mapping[str, Place],
  slots: Mapping[str, Slot],
) -> Iterator[tuple[str, Slot]]:
  """The base's own weights of the input and the output embedding.

  PEFT saves them beside the factors where target_modules name them in a certain form,
  and any where it is told save_embedding_layers=True or the vocabulary was resized:
  then what its wrappers hold too.
  """
  usual = config.saves_embeddings(module_names(keymap))
  embeddings = [name for name, place in found.items() if place.kind == "embedding"]
  is_alone = alone(config.peft_type) is not None
  factored = set() if is_alone else {*targets.modules, *targets.tied}
  with_rows = _FACTORED if is_alone else _WITH_ROWS
  rows = {slot.module: (k, slot) for k, slot in slots.items() if slot.method is Rows}
  for name in (*embeddings[:1], HEAD):
    if name not in found:
      continue
    place = found[name]
    form = AS_IS if place.kind == "turned" else place.site.entry.form
    wrapper = ""
    if name in factored:
      wrapper = _FACTORED
    elif (place.main or name) in rows:
      wrapper, (key, trained) = with_rows, rows[place.main or name]
      # Of a tied module, a copy; of another, the slot itself, which is there.
      key = name + key.removeprefix(trained.module)
      yield key, replace(trained, module=name, status="spare")
    elif name in targets.saved:
      wrapper, trained = _ORIGINAL, _in_full(place.site, name, form, "spare")
      yield f"{name}.{_SAVED}weight", trained
    status: Status = "copy" if usual and name in factored else "spare"
    yield (
      f"{name}.{wrapper}weight",
      Slot(place.site, None, "", name, form, status=status),
    )


def _check_once(slots: Mapping[str, Slot]) -> None:
  """Checks that a leaf is trained by one field of PEFT's config."""
  ways: dict[str, set[str]] = {}
  fields: dict[type[Delta] | None, str] = {
    Rows: "trainable_token_indices",
    Tuned: "modules_to_save",
  }
  for slot in slots.values():
    if slot.status == "own":
      way = fields.get(slot.method, "target_modules")
      ways.setdefault(slot.path, set()).add(way)
  for path, found in ways.items():
    if len(found) > 1:
      stacked = any(s.site.index for s in slots.values() if s.path == path)
      raise LoraxError(
        f"{path} is trained by {' and '.join(sorted(found))} both"
        + ": its layers are stacked, and have one method. Load the base with its "
        "layers apart: scan=False (--config.model.scan=false)" * stacked
      )

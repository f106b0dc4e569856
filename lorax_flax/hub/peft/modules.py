"""Modules and parameters of a model by PEFT's names, and their places in our tree."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorax_flax.errors import LoraxError, listing
from lorax_flax.hub.checkpoints.entries import EXPERTS, LINEAR, Site, kind
from lorax_flax.hub.checkpoints.keymap import KeyMap, full_key, module_of, modules
from lorax_flax.hub.peft import config as peft_config

# The kinds of modules that PEFT has a LoRA form for.
ADAPTABLE = ("linear", "embedding", "conv")
HEAD = "lm_head"


@dataclass(frozen=True)
class Place:
  """A weight that may get factors.

  Attributes:
    site: our leaf, and the place in it.
    kind: a key of `forms.ROLES`.
    main: the module that holds the weight, where this one shares it.
  """

  site: Site
  kind: str
  main: str | None = None


def of_task(keymap: KeyMap, task_type: str | None) -> KeyMap:
  """The key map of the model that PEFT wraps for a task.

  For feature extraction it is the body alone, and names have no prefix.

  Raises:
    LoraxError: a task that the family has no model for.
  """
  if task_type != peft_config.FEATURE_EXTRACTION:
    tasks = peft_config.LABEL_TASKS if keymap.label_paths else peft_config.TEXT_TASKS
    if task_type not in (None, *tasks):
      raise LoraxError(
        f"{peft_config.CONFIG_FILE}: the adapter is of a model for {task_type}, and a "
        f"{keymap.family} here is one for {listing(tasks)}: it has another head. Only "
        "PEFT can merge it (merge_and_unload)"
      )
    return keymap
  body = tuple(entry for entry in keymap.entries if entry.part == "body")
  return dataclasses.replace(keymap, prefix="", entries=body, ties={})


def tensors(keymap: KeyMap) -> dict[str, Site]:
  """Every parameter of transformers' model, by full key, in its order."""
  return {full_key(keymap, bare): site for bare, site in keymap.sites.items()}


def places(keymap: KeyMap) -> dict[str, Place]:
  """Every module with a weight, its own or a shared one, by full name, in order."""
  known = tensors(keymap)
  found = {
    name: Place(known[f"{name}.weight"], kind) for name, kind in modules(keymap).items()
  }
  for tied, bare in keymap.ties.items():
    main = module_of(full_key(keymap, bare))
    name = module_of(tied)
    turned = found[main].kind == "embedding" and name.rpartition(".")[2] == HEAD
    found[name] = Place(
      found[main].site, "turned" if turned else found[main].kind, main
    )
  return found


def parameters(keymap: KeyMap) -> dict[str, Place]:
  """Every parameter that PEFT's target_parameters may name, by full key.

  These are stacks of experts and matrices, all of which PEFT takes for (out, in).
  """
  shared = {name: place.main for name, place in places(keymap).items()}
  found = {}
  for key, site in tensors(keymap).items():
    if site.entry.axes == EXPERTS:
      found[key] = Place(site, "experts")
    elif site.entry.axes == LINEAR:
      found[key] = Place(site, "linear")
    elif kind(site.entry) == "embedding":
      found[key] = Place(site, "turned", shared.get(module_of(key)))
  return found


def tied_to(found: Mapping[str, Place], main: str) -> list[str]:
  """The modules that share the weight of `main`."""
  return [name for name, place in found.items() if place.main == main]


def module_names(keymap: KeyMap) -> list[str]:
  """Full names of all modules, with those that only contain others at the end."""
  names = [*places(keymap), *map(module_of, parameters(keymap))]
  for name in list(names):
    while name := name.rpartition(".")[0]:
      names.append(name)
  return list(dict.fromkeys(names))


def input_embedding(found: Mapping[str, Place]) -> str:
  """The module that transformers calls the input embedding: the first in the table."""
  for name, place in found.items():
    if place.kind == "embedding":
      return name
  raise LoraxError("this model has no embedding")


def all_linear(
  found: Mapping[str, Place], names: Iterable[str], is_classifier: bool
) -> list[str]:
  """The modules of "all-linear": every linear layer but the output.

  PEFT leaves out the output embedding, or in a sequence classifier the first of two
  names that the model has at its top.
  """
  names = set(names)
  out = {HEAD} if HEAD in names else set()
  if not out and is_classifier:
    out = {next((name for name in ("score", "classifier") if name in names), "")}
  return [
    name
    for name, place in found.items()
    if place.kind in ("linear", "turned") and name not in out
  ]

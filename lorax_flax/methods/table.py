"""The table of methods, which takes none whose declaration is not complete."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lorax_flax.errors import LoraxError, check_known, listing, unknown
from lorax_flax.methods.delta import Delta
from lorax_flax.methods.kernel_delta import KernelDelta
from lorax_flax.nodes import is_node


class Methods(dict[str, type[Delta]]):
  """Methods by the name that a config and a file have for them.

  Raises:
    LoraxError: what is put in declares less than a method has to.
  """

  def __init__(self, **methods: type[Delta]):
    super().__init__()
    for name, method in methods.items():
      self[name] = method

  def __setitem__(self, name: str, method: type[Delta]) -> None:
    _check(name, method)
    super().__setitem__(name, method)

  def name_of(self, delta: Delta) -> str:
    """The name of a delta's method.

    Raises:
      LoraxError: it is not in the table.
    """
    # By name, since a user's file that defines a method may be run more than once.
    same = lambda x: (x.__module__, x.__qualname__)
    for name, method in self.items():
      if same(method) == same(type(delta)):
        return name
    kind = type(delta).__name__
    raise LoraxError(
      f"{kind} is no registered method: METHODS[name] = {kind} makes it one. There are:"
      f" {listing(self)}"
    )

  def of_targets(self, name: str, options: Mapping[str, Any]) -> type[KernelDelta]:
    """The method that `LoraConfig.method` names.

    Raises:
      LoraxError: an unknown name, or an option that the method does not have.
    """
    known = {n: m for n, m in self.items() if issubclass(m, KernelDelta)}
    check_known("LoraConfig.method", name, known)
    for option in options:
      check_known(f"option of {name}", option, known[name].options)
    return known[name]


def _check(name: str, method: type[Delta]) -> None:
  if not (isinstance(method, type) and issubclass(method, Delta)):
    raise LoraxError(f"method {name!r} must be a subclass of KernelDelta, not {method}")
  if not is_node(method):
    raise LoraxError(
      f"method {name!r}: {method.__name__} must be a frozen dataclass below @lx.node"
      " (lorax_flax.node); JAX's own registration may take it for another one"
    )
  static = {f.name for f in fields(method) if f.metadata.get("static")}
  leaves = {f.name for f in fields(method)} - static
  axes = getattr(method, "axes", {})
  if lacking := leaves ^ axes.keys():
    raise LoraxError(
      f"method {name!r}: {method.__name__}.axes must have the leaves {listing(leaves)}"
      f" and no others; it differs in {listing(lacking)}"
    )
  named = {*method.trained, *method.per_trial, *method.from_base}
  if odd := named - leaves:
    raise LoraxError(f"method {name!r}: {unknown('leaf', sorted(odd)[0], leaves)}")
  if odd := {*method.common} - {*method.trained}:
    raise LoraxError(
      f"method {name!r}: {unknown('trained leaf', sorted(odd)[0], method.trained)}"
    )
  if issubclass(method, KernelDelta) and not {"roles", "dropout", "layers"} <= static:
    raise LoraxError(
      f"method {name!r}: {method.__name__} lacks the static fields "
      f"{listing({'roles', 'dropout', 'layers'} - static)}"
    )

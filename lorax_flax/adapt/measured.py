"""Measurements that a start which looks at data is given for each of its targets."""

from collections.abc import Mapping
from typing import Any

from lorax_flax.methods import eva, probe
from lorax_flax.methods.moments import Moments


def of_inputs(target: Any, moments: Moments, init_options: Mapping[str, Any]) -> Any:
  """The directions of a target's inputs for "eva", the moments for a method's start."""
  if target.style != "eva":
    return moments
  options = {**eva.OPTIONS, **init_options}
  k = max(target.rank, eva.most(target.rank, options["rho"]))
  return eva.directions(moments, k, options["whiten"])


def blank(target: Any, leaf: Any) -> Any:
  """Something of the shapes of what a target is given; the numbers don't count."""
  if target.starts_from != "inputs":
    return leaf
  return of_inputs(target, probe.of_gradient(target, probe.zeros(target)), {})

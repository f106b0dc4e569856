"""Trained leaves that all deltas of a method have in common, kept equal in training."""

from dataclasses import replace
from typing import Any

import optax


def stepped_together(
  optimizer: optax.GradientTransformation, method: type[Any]
) -> optax.GradientTransformation:
  """The optimiser, whose step takes a method's common leaves for one parameter each.

  Every delta has a copy, so that it can be followed, merged and stacked by itself. The
  first one's takes the step, by the sum of all gradients; the others' gradients are
  zero, so that norms count a leaf once, and their update is the first one's.
  """

  def common(delta: Any) -> dict[str, Any]:
    return {name: delta.leaves()[name] for name in method.common}

  def update(grads, state, params=None):
    own = {path: common(d) for path, d in grads.items() if type(d) is method}
    first, *others = sorted(own)
    summed = {name: sum(each[name] for each in own.values()) for name in own[first]}
    zero = {name: 0 * x for name, x in summed.items()}
    given = {first: summed} | dict.fromkeys(others, zero)
    grads = grads | {path: replace(grads[path], **x) for path, x in given.items()}
    updates, state = optimizer.update(grads, state, params)
    step = common(updates[first])
    return updates | {p: replace(updates[p], **step) for p in others}, state

  return optax.GradientTransformation(optimizer.init, update)

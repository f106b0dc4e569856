"""Values that are no weights, while the roles are being found: what they came from."""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lorax_flax.adapt.interpret import encoding as jx

INPUT = "<input>"
# A float that was made of integers of the data: a mask, a count, a label's place.
INTEGERS = "<integers of the input>"
ASIDE = frozenset({INPUT, INTEGERS})
# What came through a product with a weight that was multiplied by the other way before.
TURNED = "<a turned product>"


class Product(NamedTuple):
  """A weight's product with x.

  Attributes:
    paths: of the weight, or of those that were joined to it.
    sizes: number of outputs for one x: of one place on the stack axes, and of all.
  """

  paths: frozenset[str]
  sizes: frozenset[int]


@dataclass(frozen=True)
class Flow:
  """A value that is no weight.

  Attributes:
    through: paths of the weights whose products it last came through, TURNED beside one
      of that kind, and INPUT or INTEGERS where it came from the data through none.
    product: the product whose result it still is, cast or rearranged, biases added.
    made_of: paths of the weights that it is made of, where of nothing else.
  """

  through: frozenset[str] = frozenset()
  product: Product | None = None
  made_of: frozenset[str] = frozenset()

  def __or__(self, other: "Flow") -> "Flow":
    """Either value, or one made of both."""
    same = self.product if self.product == other.product else None
    made_of = self.made_of | other.made_of
    through = self.through | other.through
    return Flow(through, same, frozenset() if through else made_of)


NOTHING = Flow()
DATA = Flow(frozenset({INPUT}))

CONTRACTIONS = {
  "conv_general_dilated",
  "dot_general",
  "ragged_dot",
  "ragged_dot_general",
  "ragged_product",
}
# What leaves a product's result the result of that product.
SAME_RESULT = {
  "all_gather",
  "broadcast_in_dim",
  "convert_element_type",
  "copy",
  "copy_p",
  "name",
  "pcast",
  "psum",
  "psum_invariant",
  "pvary",
  "reduce_precision",
  "reshape",
  "sharding_constraint",
  "squeeze",
  "transpose",
}


def of_equation(eqn: Any, operands: list[Flow]) -> tuple[Flow, frozenset[str]]:
  """The result of an equation, and the weights whose products feed one in it.

  A contraction of data with a value made of weights (a masked kernel, a standardised
  one) is those weights' product, whether a delta can follow there or not.
  """
  joined = NOTHING
  for x, atom in zip(operands, eqn.invars, strict=True):
    joined = joined | _as_float(x, atom, eqn)
  if eqn.primitive.name in CONTRACTIONS:
    kernels = frozenset().union(*(x.made_of for x in operands))
    fed = frozenset().union(*(x.through for x in operands if not x.made_of))
    if kernels and fed:
      return Flow(kernels, _product(eqn, operands, kernels)), fed - ASIDE
  through_scalar = eqn.primitive.name in ("mul", "div") and not all(
    a.aval.shape for a in eqn.invars
  )
  if eqn.primitive.name in SAME_RESULT or through_scalar:
    product = next((x.product for x in operands if x.product is not None), None)
    return replace(joined, product=product), frozenset()
  return replace(joined, product=None), frozenset()


def _as_float(x: Flow, atom: Any, eqn: Any) -> Flow:
  """An operand's flow, as it goes on in the equation's result."""
  into_float = any(jx.is_float(var.aval) for var in eqn.outvars)
  if not into_float or jx.is_float(atom.aval) or INPUT not in x.through:
    return x
  return replace(x, through=x.through - {INPUT} | {INTEGERS})


def _product(eqn: Any, operands: list[Flow], paths: frozenset[str]) -> Product | None:
  """A dot_general with a value made of weights."""
  if eqn.primitive.name != "dot_general":
    return None
  side = next(i for i, x in enumerate(operands) if x.made_of)
  contract, batch = (axes[side] for axes in jx.param(eqn, "dimension_numbers"))
  shape = eqn.invars[side].aval.shape
  kept = [i for i in range(len(shape)) if i not in (*contract, *batch)]
  return Product(paths, product_sizes(shape, kept, batch))


def product_sizes(shape: tuple[int, ...], kept: Any, shared: Any) -> frozenset[int]:
  """The sizes of `Product`, from the weight's axes at the product."""
  out = math.prod(shape[i] for i in kept)
  return frozenset({out, out * math.prod(shape[i] for i in shared)})

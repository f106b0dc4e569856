"""Follows the adapted weights through a traced function, equation by equation."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lorax_flax.adapt.interpret import (
  call_rules,
  custom_derivatives,
  layout_rules,
  look_ups,
  product_rules,
  weights,
)
from lorax_flax.adapt.interpret import encoding as jx
from lorax_flax.adapt.interpret.layout_rules import Unsupported
from lorax_flax.adapt.interpret.view import View, is_view
from lorax_flax.adapt.paths import path_key
from lorax_flax.errors import LoraxError
from lorax_flax.methods.probe import Observe

log = logging.getLogger(__name__)

CALL_RULES = {**call_rules.RULES, **custom_derivatives.RULES}


def _on_values(eqn: Any, operands: Sequence[Any]) -> list[Any]:
  """The equation's results on the weights as they are; shapes where they are shapes."""
  if any(is_view(x) and x.is_abstract for x in operands):
    return [jx.struct(v.aval) for v in eqn.outvars]
  return weights.evaluated(eqn, [x.value if is_view(x) else x for x in operands])


@dataclass
class Run:
  """One rewritten evaluation of a jaxpr: what it was given, what it has met.

  Attributes:
    dropout_key: LoRA's dropout acts only where there is one.
    may_materialize: whether W + delta may be formed where a delta cannot follow.
    observe: sees each product with a delta's first factor; None: nothing does.
    inside: the rule that is being followed, for messages.
    strict: where a delta cannot follow, raise `Unsupported` whatever is allowed.
    spread: of the variables met so far, those that were broadcast: `encoding.spread`.
  """

  dropout_key: jax.Array | None
  may_materialize: bool
  observe: Observe | None = None
  inside: str = ""
  strict: bool = False
  used: set[str] = field(default_factory=set)
  sites: dict[str, int] = field(default_factory=dict)
  spread: dict[Any, tuple[int, ...]] = field(default_factory=dict)

  def jaxpr(self, jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any]) -> list:
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, operands, strict=True))
    self.spread.update(jx.spread(jaxpr))

    def read(atom):
      return atom.val if isinstance(atom, jx.Literal) else env[atom]

    for eqn in jx.equations(jaxpr):
      results = self.equation(eqn, [read(a) for a in eqn.invars])
      env.update(zip(eqn.outvars, results, strict=True))
    return [read(a) for a in jaxpr.outvars]

  def closed(self, jaxpr: Any, operands: Sequence[Any]) -> list:
    """Results of a program of its own, at whose end rows looked up in it are data."""
    results = self.jaxpr(*jx.open_jaxpr(jaxpr), operands)
    return [self.rows(x) if is_view(x) and x.looked_up else x for x in results]

  def rows(self, view: View) -> Any:
    """Rows of a table as data, W + delta of these rows alone."""
    self.used |= view.paths()
    return view.dense()

  def equation(self, eqn: Any, operands: list[Any]) -> list[Any]:
    if not any(map(is_view, operands)):
      return jx.bind(eqn, operands)
    name = eqn.primitive.name
    try:
      data = look_ups.data(eqn, operands)
      if data:
        plain = [self.rows(x) if i in data else x for i, x in enumerate(operands)]
        return self.equation(eqn, plain)
      views = [x for x in operands if is_view(x)]
      call = jx.call(eqn)
      if call is None and len({v.is_frozen for v in views}) > 1:
        settled = [x.dense() if is_view(x) and x.is_frozen else x for x in operands]
        return self.equation(eqn, settled)
      if isinstance(call, jx.Call) and call.has_rule:
        operands = [x.chosen() if is_view(x) else x for x in operands]
      if call is not None:
        in_place = isinstance(call, jx.Call) and call.is_inline
        if not in_place and any(v.is_abstract for v in views):
          raise Unsupported("a change of the weight alone does not go in")
        return CALL_RULES[name](self, eqn, call, operands)
      if name in look_ups.RULES:
        with jx.scope(eqn):
          out = _on_values(eqn, operands)
          if name in layout_rules.ELEMENTWISE:
            operands = list(map(self.narrow, eqn.invars, operands))
          return list(look_ups.RULES[name](eqn, operands, out))
      if name in product_rules.RULES:
        product_rules.axes_of(eqn, operands)

        def product(x):
          if views[0].is_abstract:
            return jx.struct(eqn.outvars[0].aval)
          pair = [w.value if is_view(w) else x for w in operands[:2]]
          return weights.product(eqn, [*pair, *operands[2:]])

        with jx.scope(eqn):
          result = product_rules.RULES[name](
            eqn, operands, product, self.drop, self.observe
          )
        self.used |= views[0].paths()
        return [result]
    except Unsupported as e:
      why = str(e)
    else:
      why = "it has no rule"
    dense = [self.materialize(name, x, why) if is_view(x) else x for x in operands]
    return jx.bind(eqn, dense)

  def narrow(self, atom: Any, x: Any) -> Any:
    """A value without the axes along which it was broadcast; their size is 1."""
    if is_view(x) or isinstance(atom, jx.Literal) or atom not in self.spread:
      return x
    return x[tuple(slice(n) for n in self.spread[atom])]

  def materialize(self, primitive: str, view: View, why: str = "it has no rule") -> Any:
    """W + delta, where that was allowed; otherwise an error that names both."""
    if view.looked_up is not None or view.is_frozen:
      return self.rows(view)
    if self.strict:
      raise Unsupported(f"at {primitive!r}, {why}")
    if not self.may_materialize or view.bias is not None:
      raise LoraxError(
        f"{view.path!r} reaches {primitive!r}{self.inside}, where a delta cannot"
        f" follow: {why}."
        " Exclude it, or pass on_unsupported='materialize' to form W + delta there"
      )
    where = f"{primitive!r}{self.inside}"
    log.warning("forming W + delta of %r for %s: %s", view.path, where, why)
    self.used |= view.paths()
    return view.dense()

  def warn_dense(self, path: str, name: str, why: str):
    log.warning("forming the dense gradient of %r in %s: %s", path, name, why)

  def drop(self, view: View, x: jax.Array) -> jax.Array:
    """LoRA's dropout of x, of its own for each use and place in the program."""
    if self.dropout_key is None or view.dropout == 0.0:
      return x
    # Uses are told apart within one place of a stack: a loop over the layers of a
    # stacked weight numbers its uses as a scan over it does.
    index = view.index
    static = not isinstance(index, jax.core.Tracer)
    place = f"{view.path}#{int(index)}" if static else view.path
    site = self.sites[place] = self.sites.get(place, -1) + 1
    key = path_key(self.dropout_key, f"{view.path}:{site}")
    index = call_rules.in_shard(index, jx.shards(x))
    keep = jax.random.bernoulli(
      jax.random.fold_in(key, index), 1.0 - view.dropout, x.shape
    )
    return jnp.where(keep, x / (1.0 - view.dropout), jnp.zeros((), x.dtype)).astype(
      x.dtype
    )

  def plain(self, primitive: str, values: Sequence[Any]) -> list[Any]:
    why = "it hands the weight on as a result"
    return [self.materialize(primitive, v, why) if is_view(v) else v for v in values]

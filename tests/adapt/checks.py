"""What must hold of every adapted function."""

import jax
import jax.numpy as jnp
import numpy as np

import lorax_flax as lx
from lorax_flax.adapt.paths import flatten


def perturbed(adapter, seed=7):
  """The adapter with every trained leaf moved off its start."""
  trained, rest = lx.partition(adapter, lx.trainable_mask(adapter))
  leaves, tree = jax.tree.flatten(trained)
  rng = np.random.default_rng(seed)  # which has nothing to compile for each shape
  moved = [x + (0.2 * rng.normal(size=x.shape)).astype(x.dtype) for x in leaves]
  return lx.combine(jax.tree.unflatten(tree, moved), rest)


def all_equations(jaxpr):
  """Every equation of a jaxpr and of the jaxprs inside its equations."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  for eqn in jaxpr.eqns:
    yield eqn
    for value in eqn.params.values():
      for inner in value if isinstance(value, (tuple, list)) else [value]:
        if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
          yield from all_equations(inner)


def loss_of(fn):
  def loss(*args):
    out = fn(*args)
    return jnp.sum(jnp.sin(out))

  return loss


def grad_of_trained(lora, params, adapter, *args):
  """(loss, gradient) with respect to the trained leaves."""
  trained, rest = lx.partition(adapter, lx.trainable_mask(adapter))

  def loss(trained):
    return loss_of(lora.apply)(params, lx.combine(trained, rest), *args)

  return loss, trained


def check_equals_merged(lora, apply_fn, params, adapter, *args, tol=5e-5):
  """apply(p, a) = apply_fn(merge(p, a)) in value and in gradient."""
  trained, rest = lx.partition(adapter, lx.trainable_mask(adapter))

  def merged_loss(trained):
    return loss_of(apply_fn)(lx.merge(params, lx.combine(trained, rest)), *args)

  loss, _ = grad_of_trained(lora, params, adapter, *args)
  got, grads = jax.jit(jax.value_and_grad(loss))(trained)
  want, want_grads = jax.jit(jax.value_and_grad(merged_loss))(trained)
  np.testing.assert_allclose(got, want, rtol=tol, atol=tol)
  for path, (g, w) in flatten(
    jax.tree.map(lambda g, w: np.stack([g, w]), grads, want_grads)
  ).items():
    scale = max(1.0, float(np.abs(w).max()))
    np.testing.assert_allclose(g / scale, w / scale, atol=tol, err_msg=path)
  assert all(float(np.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def check_no_dense_gradient(lora, params, adapter, *args):
  """No contraction in the gradient's jaxpr gives something of a target's size."""
  loss, trained = grad_of_trained(lora, params, adapter, *args)
  jaxpr = jax.make_jaxpr(jax.grad(loss))(trained)
  leaves = flatten(params)
  shapes = set()
  for path, delta in adapter.items():
    if isinstance(delta, lx.KernelDelta):
      shape = tuple(leaves[path].shape)
      shapes.add(tuple(sorted(shape)))
      stack = [n for n, role in zip(shape, delta.roles, strict=True) if role == "stack"]
      rest = sorted(
        n for n, role in zip(shape, delta.roles, strict=True) if role != "stack"
      )
      shapes |= {tuple(rest), tuple(sorted([*stack, *rest]))}
  for eqn in all_equations(jaxpr):
    if eqn.primitive.name in ("dot_general", "conv_general_dilated", "ragged_outer"):
      for out in eqn.outvars:
        assert tuple(sorted(out.aval.shape)) not in shapes, (
          f"a dense gradient: {out.aval.shape}"
        )

"""What the compiled step costs, on a shape that compiles at once; and the counters."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks import common, flops, memory
from launch.dryrun import hlo

# Wide enough that the deltas are small beside the kernels, as they are in use.
SMALL = common.Shape(
  layers=3, hidden=96, heads=4, mlp=256, vocab=211, batch=4, length=24, rank=2
)


def compiled(function, *shapes):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(function).lower(*arguments).compile().as_text()


def test_a_product_counts_two_flops_for_each_multiplication():
  text = compiled(lambda x, w: jnp.einsum("bik,bkj->bij", x, w), (3, 5, 7), (3, 7, 11))
  assert hlo.matmul_flops(text) == 2 * 3 * 5 * 7 * 11


def test_a_loops_body_counts_as_often_as_it_runs():
  def run(x, w):
    body = lambda y, w: (jax.lax.scan(lambda z, _: (z @ w, None), y, length=3)[0], None)
    return jax.lax.scan(body, x, w)[0]

  text = compiled(run, (5, 8), (4, 8, 8))
  assert hlo.matmul_flops(text) == 2 * 5 * 8 * 8 * 3 * 4


def test_a_loop_of_unknown_length_is_refused():
  def run(x):
    return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ y, x)

  with pytest.raises(ValueError, match="trip count"):
    hlo.matmul_flops(compiled(run, (4, 4)))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("method", ["query_value", "all_linear"])
def test_the_step_does_no_more_than_its_floor(method, scan):
  job = common.job(SMALL, method, scan=scan, abstract=True)
  got = hlo.matmul_flops(job.compile().as_text())
  assert got <= 1.01 * flops.floor(SMALL, job.plan, strict=False)
  assert got >= flops.floor(SMALL, job.plan, strict=True)


def test_full_fine_tuning_does_more_than_the_floor_of_a_delta():
  job = common.job(SMALL, "full", abstract=True)
  lora = common.job(SMALL, "query_value", abstract=True)
  got = hlo.matmul_flops(job.compile().as_text())
  assert got > 1.3 * flops.floor(SMALL, lora.plan, strict=False)


def test_the_step_takes_half_of_full_fine_tunings_memory():
  # A third of the real shape, layers and table: what is kept is kept a layer.
  shape = common.Shape(layers=4, vocab=common.ROBERTA_BASE.vocab // 3)
  found = {
    method: memory.memory(common.job(shape, method, abstract=True).compile())
    for method in ("full", "query_value")
  }
  assert found["query_value"]["total"] <= 0.55 * found["full"]["total"]


def test_a_factors_gradient_takes_no_transposed_copy_of_the_activations():
  shape = dataclasses.replace(SMALL, length=23)  # as many tokens as nothing else
  job = common.job(shape, "all_linear", abstract=True)
  tokens = shape.batch * shape.length
  copied = [
    line
    for line in job.compile().as_text().splitlines()
    if re.search(rf" = f32\[({shape.hidden}|{shape.mlp}),{tokens}\]", line)
  ]
  assert not copied

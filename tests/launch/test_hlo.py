"""Counting in programs that a TPU's compiler made, with no TPU: against formulas."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import lorax_flax as lx
from launch.dryrun import hlo, jaxpr_flops
from launch.dryrun import topology as topologies
from launch.dryrun.hlo import program
from lorax_flax import quant, ragged
from lorax_flax.models import head as heads
from lorax_flax.models import ops
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train.token_scores import token_scores

pytest.importorskip("libtpu")


@functools.cache
def _mesh(name, *sizes):
  return meshes.make(meshes.MeshConfig(*sizes), topologies.describe(name).devices)


def compiled(function, *arguments, mesh=None):
  """The text of a function compiled for v5e; arguments are (shape, spec) pairs."""
  mesh = mesh or _mesh("v5e:2x2", 1, 1, 4)
  shapes = [
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
    for shape, *spec in arguments
  ]
  with topologies.quiet():
    return jax.jit(function).lower(*shapes).compile().as_text()


P = PartitionSpec


@pytest.mark.parametrize(
  ("equation", "left", "right"),
  [
    ("ik,kj->ij", (256, 384), (384, 512)),
    ("bik,bkj->bij", (3, 128, 256), (3, 256, 384)),
    ("bhqk,bhkd->bqhd", (2, 3, 128, 256), (2, 3, 256, 128)),
    ("bqhd,bkhd->bhqk", (2, 128, 3, 128), (2, 256, 3, 128)),
    ("bti,btj->ij", (2, 128, 256), (2, 128, 384)),
  ],
)
def test_every_product_counts_however_the_compiler_writes_it(equation, left, right):
  sizes = dict(zip(equation.replace(",", "").split("->")[0], left + right, strict=True))
  text = compiled(lambda x, y: jnp.einsum(equation, x, y), (left,), (right,))
  assert "convolution" in text
  assert hlo.matmul_flops(text) == 2 * np.prod(list(sizes.values()))


def test_a_convolution_counts_no_products_with_its_padding():
  def run(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), ((1, 1), (1, 1)))

  text = compiled(run, ((8, 128, 6, 6),), ((128, 128, 3, 3),))
  # Of 6 × 6 places with 3 × 3 neighbours, 16 × 16 pairs are inside.
  assert hlo.matmul_flops(text) == 2 * 8 * 128 * 128 * 16 * 16


def test_a_loops_body_counts_as_often_as_it_runs_though_the_text_does_not_say():
  def run(x, w):
    def body(y, w):
      return lax.scan(lambda z, _: (jnp.tanh(z @ w), None), y, length=3)[0], None

    return lax.scan(body, x, w)[0]

  text = compiled(run, ((128, 256),), ((5, 256, 256),))
  assert "known_trip_count" not in text
  assert " while(" in text
  assert hlo.matmul_flops(text) == 2 * 128 * 256 * 256 * 3 * 5


def test_a_loop_of_unknown_length_is_refused():
  def run(x):
    return lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ y, x)

  with pytest.raises(ValueError, match="trip count"):
    hlo.matmul_flops(compiled(run, ((256, 256),)))


def test_memory_traffic_is_what_goes_in_and_out():
  rows, width = 8192, 4096
  text = compiled(lambda x, w: x @ w, ((rows, width),), ((width, width),))
  assert hlo.hbm_bytes(text) == 2 * (2 * rows * width + width * width)


def test_a_scan_reads_of_stacked_weights_each_layer_once():
  layers, rows, width = 6, 8192, 4096

  def run(x, w):
    return lax.scan(lambda x, w: (x @ w, None), x, w)[0]

  text = compiled(run, ((rows, width),), ((layers, width, width),))
  activations, weights = 2 * rows * width, layers * 2 * width * width
  # Activations may stay in a cache from layer to layer.
  assert 2 * activations + weights <= hlo.hbm_bytes(text)
  assert hlo.hbm_bytes(text) <= 1.01 * (2 * (layers + 1) * activations + weights)


def test_a_kernel_that_goes_round_sends_what_gathering_it_would():
  mesh = _mesh("v5e:2x2", 1, 4, 1)
  layers, rows, width = 4, 1024, 2048

  def run(x, w):
    y = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
    return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P("fsdp")))

  stacked = ((layers, width, width), None, "fsdp")
  text = compiled(run, ((rows, width), "fsdp"), stacked, mesh=mesh)
  found = hlo.collectives(text)
  assert sum(c.sent for c in found) == layers * 2 * width * width * 3 / 4
  assert hlo.matmul_flops(text) == 2 * layers * rows // 4 * width * width


def test_a_collective_counts_where_it_starts_not_where_it_goes_on():
  gather = (
    "bf16[8,8]{1,0} all-gather(%p), channel_id=5, replica_groups=[1,2]<=[2],"
    ' backend_config={"async_collective_fusion_config":{}}'
  )
  done = f"""%done (p: bf16[4,8]) -> bf16[8,8] {{
  %p = bf16[4,8]{{1,0}} parameter(0)
  ROOT %g3 = {gather}
}}
"""
  start = f"""%start (p: bf16[4,8]) -> bf16[8,8] {{
  %p = bf16[4,8]{{1,0}} parameter(0)
  %g1 = {gather}
  ROOT %s = (u32[]) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}}
"""
  entry = """ENTRY %main (p: bf16[4,8]) -> bf16[8,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %f1 = (u32[]) fusion(%p), kind=kCustom, calls=%start
  ROOT %f2 = bf16[8,8]{1,0} fusion(%p), kind=kCustom, calls=%done
}
"""
  (found,) = hlo.collectives(start + done + entry)
  assert (found.kind, found.times, found.sent) == ("all-gather", 1, 64)
  lost = entry.replace("calls=%start", "calls=%done")
  with pytest.raises(ValueError, match="never start: channels \\['5'\\]"):
    hlo.collectives(done + lost)


@pytest.mark.parametrize(
  ("groups", "members"),
  [
    ("replica_groups=[4,2]<=[8]", (0, 1)),
    ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
    ("replica_groups={{0,3},{1,2}}", (0, 3)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
  ],
)
def test_a_groups_members_are_read_of_every_form(groups, members):
  text = f"""HloModule m
ENTRY %main (p: bf16[4,8]) -> bf16[8,8] {{
  %p = bf16[4,8]{{1,0}} parameter(0)
  ROOT %g = bf16[8,8]{{1,0}} all-gather(%p), channel_id=1, {groups}, dimensions={{0}}
}}
"""
  (found,) = hlo.collectives(text)
  assert found.members == members
  assert found.sent == 128 * (len(members) - 1) / len(members)


def test_groups_of_an_unknown_form_are_refused():
  text = """ENTRY %main (p: f32[4]) -> f32[4] {
  ROOT %r = f32[4]{0} all-reduce(%p), replica_groups=?, to_apply=%add
}
"""
  with pytest.raises(ValueError, match="unknown form"):
    hlo.collectives(text)


def test_a_tile_pads_the_two_most_minor_dimensions():
  array = program.Array("bf16", (2, 100, 16), "1,2,0:T(8,128)(2,1)S(1)")
  assert array.size == 2 * 2 * 100 * 16
  assert array.padded == 2 * 2 * 16 * 128
  assert not array.in_hbm
  assert program.Array("f32", (3, 5), "1,0").padded == 60
  assert program.Array("f32", (300,), "0:T(256)").padded == 2048


@pytest.mark.parametrize("scan", [False, True])
def test_the_traced_count_is_what_the_compiler_does_where_it_recomputes_nothing(scan):
  def loss(w, x):
    if scan:
      x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
    else:
      for one in w:
        x = jnp.tanh(x @ one)
    return jnp.sum(x.astype(jnp.float32))

  w, x = (4, 256, 256), (128, 256)
  traced = jax.jit(jax.grad(loss)).trace(*(jnp.zeros(s, jnp.bfloat16) for s in (w, x)))
  # Forward; the gradients of weights, and of every input but the first.
  want = 2 * 128 * 256 * 256 * (4 + 4 + (4 if scan else 3))
  assert jaxpr_flops.matmul_flops(traced.jaxpr) == want
  text = compiled(jax.grad(loss), (w,), (x,))
  assert hlo.matmul_flops(text) == pytest.approx(want, rel=0.35)


def test_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="not the text of a compiled program"):
    hlo.matmul_flops("nothing")


def test_kernels_of_attention_are_counted_by_their_operands():
  def step(q, k, v, mask):
    attend = functools.partial(ops.attention, mask_BxS=mask, causal=True)
    y, pull = jax.vjp(attend, q, k, v)
    return pull(y)

  mesh = _mesh("v5e:2x2", 1, 2, 2)
  q, k = (2, 256, 4, 64), (2, 256, 2, 64)
  put = NamedSharding(mesh, P())
  arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=put) for s in (q, k, k)]
  mask = jax.ShapeDtypeStruct((2, 256), jnp.int32, sharding=put)
  with jax.set_mesh(mesh), topologies.quiet():
    traced = jax.jit(step).trace(*arrays, mask)
    text = traced.lower().compile().as_text()
  one = 2 * 2 * 4 * 256 * 256 * 64  # Of every query with every key.
  names = ("splash_mha_fwd", "splash_mha_dkv", "splash_mha_dq")
  assert hlo.kernel_runs(text) == dict.fromkeys(names, 1)
  # And a sum over features that the rule takes as a product.
  few = 2 * 2 * 4 * 256 * 64
  assert jaxpr_flops.matmul_flops(traced.jaxpr) == 6 * one + few
  assert hlo.matmul_flops(text) == 9 * one // 4  # On each of four chips.


def test_ragged_products_count_the_rows_that_are_expected():
  def step(x, w, sizes):
    y, pull = jax.vjp(lambda x, w: ragged.product(x, w, sizes, active=128), x, w)
    return pull(jnp.sin(y))

  devices = topologies.describe("v5e:2x2").devices
  put = NamedSharding(jax.sharding.Mesh(devices[:1], ("x",)), P())
  x, w = (
    jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=put)
    for s in ((512, 256), (4, 256, 384))
  )
  sizes = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=put)
  with topologies.quiet():
    traced = jax.jit(step).trace(x, w, sizes)
    text = traced.lower().compile().as_text()
  want = 3 * 2 * 128 * 256 * 384
  assert jaxpr_flops.matmul_flops(traced.jaxpr) == want
  assert hlo.matmul_flops(text) == want


def test_products_of_4_bit_kernels_are_counted_and_form_no_dense_kernel():
  sizes, shape = (512, 768), (4, 64, 512)
  leaf = quant.quantize(jax.ShapeDtypeStruct(sizes, jnp.bfloat16), "nf4")

  fn = lambda params, x: x @ params["w"]
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets="w"))

  def by_x(params, x):
    y, pull = jax.vjp(lambda x: lora.apply(params, {}, x), x)
    return pull(y)

  mesh = _mesh("v5e:2x2", 1, 4, 1)
  put = lambda x, *spec: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec))
  )
  leaf = jax.tree.map(put, leaf)
  x = put(jax.ShapeDtypeStruct(shape, jnp.bfloat16), "fsdp")
  with jax.set_mesh(mesh), topologies.quiet():
    traced = jax.jit(by_x).trace({"w": leaf}, x)
    text = traced.lower().compile().as_text()
  one = 2 * math.prod(sizes) * math.prod(shape[:-1])
  assert jaxpr_flops.matmul_flops(traced.jaxpr) == 2 * one
  assert hlo.matmul_flops(text) == 2 * one // 4  # On each of four chips.
  assert "bf16[512,768]" not in text
  assert "bf16[768,512]" not in text


def test_a_head_is_gathered_once_for_all_chunks_of_a_loss():
  def step(kernel, x, labels):
    def loss(x):
      return token_scores(heads.linear(kernel), x, labels, room=8 * 512).smoothed.sum()

    return jax.grad(loss)(x)

  mesh = _mesh("v5e:2x2", 1, 4, 1)
  struct = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
    shape, dtype, sharding=NamedSharding(mesh, P(*spec))
  )
  kernel = struct((256, 512), jnp.bfloat16, "fsdp")
  x = struct((4, 64, 256), jnp.bfloat16, "fsdp")
  with jax.set_mesh(mesh), topologies.quiet():
    lowered = jax.jit(step).lower(kernel, x, struct((4, 64), jnp.int32, "fsdp"))
    text = lowered.compile().as_text()
  gathers = [c for c in hlo.collectives(text) if c.kind == "all-gather"]
  assert "while" in text
  assert sum(c.times for c in gathers) == 1

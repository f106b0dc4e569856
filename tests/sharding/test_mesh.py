import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

import lorax_flax as lx
from lorax_flax.errors import LoraxError
from lorax_flax.methods import Tuned
from lorax_flax.models import registry
from lorax_flax.sharding import mesh as meshes
from lorax_flax.sharding.mesh import MeshConfig

EIGHT = AbstractMesh((2, 2, 2, 1, 1), meshes.AXES, (AxisType.Auto,) * 5)
AXES = {
  "up": ("embed", "mlp"),
  "down": ("layers", "mlp", "embed"),
  "bias": ("mlp",),
  "odd": ("embed", "vocab"),
  "twice": ("heads", "mlp"),
}


def _shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def _specs(tree):
  return jax.tree.map(lambda x: tuple(x.spec), tree)


@pytest.mark.parametrize(
  ("config", "devices", "sizes"),
  [
    (MeshConfig(), 8, (8, 1, 1, 1, 1)),
    (MeshConfig(data=1, fsdp=-1, tensor=2), 8, (1, 4, 2, 1, 1)),
    (MeshConfig(data=2, fsdp=2, tensor=2), 8, (2, 2, 2, 1, 1)),
    (MeshConfig(fsdp=4, tensor=2), 8, (1, 4, 2, 1, 1)),
    (MeshConfig(expert=4, tensor=2), 8, (1, 1, 2, 4, 1)),
    (MeshConfig(fsdp=2, sequence=4), 8, (1, 2, 1, 1, 4)),
  ],
)
def test_one_axis_takes_what_is_left(config, devices, sizes):
  assert config.sizes(devices) == sizes


@pytest.mark.parametrize(
  ("fields", "devices", "message"),
  [
    (
      {"fsdp": 3},
      8,
      "data -1 × fsdp 3 × tensor 1 × expert 1 × sequence 1 does not fit 8",
    ),
    ({"data": 2}, 8, "does not fit 8 devices"),
    ({"data": 16}, 8, "does not fit 8 devices"),
    ({"fsdp": -1}, 8, "only one axis can be what is left, not mesh.data, mesh.fsdp"),
    ({"tensor": 0}, 8, "mesh.tensor is 0"),
    ({"tensor": -2}, 8, "mesh.tensor is -2"),
    ({"tensor": 2.0}, 8, "mesh.tensor must be a whole number, not 2.0"),
    ({"data": True}, 8, "mesh.data must be a whole number"),
  ],
)
def test_a_mesh_that_does_not_fit_is_an_error(fields, devices, message):
  with pytest.raises(LoraxError, match=message):
    MeshConfig(**fields).sizes(devices)


def test_each_axis_is_cut_as_its_name_says():
  params = {"up": _shape(8, 12), "down": _shape(3, 12, 8), "bias": _shape(12)}
  assert _specs(meshes.of_params(EIGHT, AXES, params)) == {
    "up": ("fsdp", "tensor"),
    "down": (None, "tensor", "fsdp"),
    "bias": ("tensor",),
  }


def test_what_can_not_be_cut_stays_whole_and_is_said():
  params = {"up": _shape(8, 12), "odd": _shape(8, 37), "twice": _shape(4, 6)}
  assert _specs(meshes.of_params(EIGHT, AXES, params)) == {
    "up": ("fsdp", "tensor"),
    "odd": ("fsdp",),
    "twice": ("tensor",),
  }
  assert meshes.not_sharded(EIGHT, AXES, params) == [
    "not sharded along mesh.tensor, since vocab of 37 can't be split into 2: odd",
    "not sharded along mesh.tensor, since tensor shards another of its axes: twice",
  ]


@pytest.mark.parametrize(
  ("axes", "message"),
  [
    ({}, "unknown path with named axes 'up'"),
    ({"up": ("embed", "mpl")}, "how to shard axis 'mpl' of 'up'.* did you mean 'mlp'"),
    ({"up": ("embed", None)}, "how to shard axis None of 'up'"),
    ({"up": ("embed",)}, "has 2 axes, and names for 1"),
    ({"up": ()}, "names every axis of every weight"),
  ],
)
def test_a_weight_that_no_rule_covers_is_an_error(axes, message):
  with pytest.raises(LoraxError, match=message):
    meshes.of_params(EIGHT, axes, {"up": _shape(8, 12)})


def _adapter(**config):
  """Of two kernels, one of them in a stack of three."""

  def fn(params, x):
    body = lambda x, w: (x @ params["up"] @ w, None)
    return jax.lax.scan(body, x, params["down"])[0] + params["bias"].sum()

  params = {
    "up": jnp.ones((8, 12)),
    "down": jnp.ones((3, 12, 8)),
    "bias": jnp.ones(12),
  }
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, targets=["up", "down"], **config))
  return lora.init(jax.random.key(0), params, jnp.ones((4, 8)))


def test_a_factor_takes_the_names_of_the_axes_that_it_multiplies():
  lies = meshes.of_adapter(EIGHT, AXES, _adapter(tuned=["bias"]))
  up, down = lies["up"], lies["down"]
  assert tuple(up.a.spec) == ("fsdp",)  # embed, rank
  assert tuple(up.b.spec) == (None, "tensor")  # rank, mlp
  assert tuple(up.scale.spec) == ()
  assert tuple(down.a.spec) == (None, "tensor")  # layers, mlp, rank
  assert tuple(down.b.spec) == (None, None, "fsdp")  # layers, rank, embed
  assert isinstance(lies["bias"], Tuned)
  assert tuple(lies["bias"].value.spec) == tuple(lies["bias"].original.spec)
  assert tuple(lies["bias"].value.spec) == ("tensor",)


def test_a_magnitude_and_an_added_bias_lie_along_the_outputs():
  dora = meshes.of_adapter(EIGHT, AXES, _adapter(use_dora=True))
  assert tuple(dora["up"].magnitude.spec) == ("tensor",)
  assert tuple(dora["down"].magnitude.spec) == (None, "fsdp")
  biased = meshes.of_adapter(EIGHT, AXES, _adapter(lora_bias=True))
  assert tuple(biased["up"].bias.spec) == ("tensor",)


def test_a_stack_adapted_in_part_keeps_its_axes():
  adapter = _adapter(layers=(0, 2), stack_axes={"down": (0,)})
  lies = meshes.of_adapter(EIGHT, AXES, {"down": adapter["down"]})
  assert adapter["down"].a.shape == (2, 12, 2)
  assert tuple(lies["down"].a.spec) == (None, "tensor")


@pytest.mark.parametrize("name", sorted(registry.FAMILIES))
def test_every_family_names_only_axes_that_the_table_has(name):
  family = registry.FAMILIES[name]
  config = family.configure({"model_type": name})
  # Scanned, where the layers have all of their names once, and the stack's own.
  module = family.build(config, jnp.float32, True, "none")
  axes = meshes.names_by_path(family.logical_axes(module))
  assert meshes.of_params(EIGHT, axes, family.shapes(module))


def test_an_axis_for_experts_is_for_models_that_have_some():
  mesh = AbstractMesh((1, 1, 2, 4, 1), meshes.AXES, (AxisType.Auto,) * 5)
  params = {"up": _shape(8, 4, 6), "odd": _shape(6, 4, 6)}
  axes = dict.fromkeys(params, ("expert", "embed", "mlp"))
  assert _specs(meshes.of_params(mesh, axes, params)) == {
    "up": ("expert", None, "tensor"),
    "odd": (None, None, "tensor"),
  }
  assert meshes.not_sharded(mesh, axes, params) == [
    "not sharded along mesh.expert, since expert of 6 can't be split into 4: odd"
  ]
  with pytest.raises(
    LoraxError, match=r"mesh.expert is 4, and the model has no experts"
  ):
    meshes.of_params(mesh, {"up": ("embed", "mlp")}, {"up": _shape(4, 6)})


def test_a_batch_that_can_not_be_spread_is_an_error():
  meshes.check_batch(EIGHT, "train.batch_size", 16, parts=4)
  with pytest.raises(
    LoraxError, match=r"batch_size is 6, and can't be spread .* the 4"
  ):
    meshes.check_batch(EIGHT, "train.batch_size", 6)
  with pytest.raises(LoraxError, match=r"16, and in 8 parts \(train.accumulation\)"):
    meshes.check_batch(EIGHT, "train.batch_size", 16, parts=8)


def test_weights_are_sharded_along_the_tokens_axis_too():
  mesh = AbstractMesh((1, 2, 1, 1, 4), meshes.AXES, (AxisType.Auto,) * 5)
  params = {"up": _shape(16, 6), "odd": _shape(12, 6)}
  axes = dict.fromkeys(params, ("embed", "mlp"))
  assert _specs(meshes.of_params(mesh, axes, params)) == {
    "up": (("fsdp", "sequence"),),
    "odd": (),
  }
  assert meshes.not_sharded(mesh, axes, params) == [
    "not sharded along mesh.fsdp × mesh.sequence, since embed of 12 can't be split into"
    " 8: odd"
  ]


def test_rows_that_can_not_be_split_are_an_error():
  mesh = AbstractMesh((1, 1, 1, 1, 4), meshes.AXES, (AxisType.Auto,) * 5)
  meshes.check_length(mesh, "data.max_length", 64)
  with pytest.raises(
    LoraxError, match=r"data.max_length is 66, .* the 4 devices of mesh.sequence"
  ):
    meshes.check_length(mesh, "data.max_length", 66)

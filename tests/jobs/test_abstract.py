"""Jobs of shapes: those of the large configs, and that they are what training runs."""

import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from experiments import run
from experiments.cli import config_dict, config_flag
from lorax_flax.data.examples import Splits
from lorax_flax.errors import LoraxError
from lorax_flax.jobs import abstract
from lorax_flax.sharding import mesh as meshes
from lorax_flax.sharding.mesh import AXES
from lorax_flax.tasks import classification
from lorax_flax.train import loop
from lorax_flax.train.config import durations
from tests.experiments import peers, token_ids


def _mesh(*sizes):
  """Devices that are not there."""
  sizes += (1,) * (len(AXES) - len(sizes))
  return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes_on_each(tree):
  shards = [(x, x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)]
  return sum(math.prod(shape) * x.dtype.itemsize for x, shape in shards)


def _llama(layers, hidden, mlp, kv):
  """Parameters of Llama 3, and of rank-16 factors on its linear layers."""
  kernels = [
    *((hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)),
    *((hidden, mlp), (hidden, mlp), (mlp, hidden)),
  ]
  layer = sum(m * n for m, n in kernels) + 2 * hidden
  whole = layers * layer + 2 * 128256 * hidden + hidden
  return whole, layers * 16 * sum(m + n for m, n in kernels)


_D, _L = 12288, 96
GPT3 = _L * (12 * _D**2 + 13 * _D) + (50257 + 2048) * _D + 2 * _D
# Of Mixtral's 32 layers: eight experts' two kernels, and attention's four.
_EXPERTS = 32 * 8 * 3 * 4096 * 14336
_ATTENTION = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
_REST = 32 * (4096 * 8 + 2 * 4096) + 2 * 32000 * 4096 + 4096  # routers, norms, tables
_FACTORS = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024))
_FACTORS += 32 * 8 * 16 * ((4096 + 2 * 14336) + (14336 + 4096))
MIXTRAL = _EXPERTS + _ATTENTION + _REST, _FACTORS
# Of each config: a mesh, its parameters, and those that are trained.
LARGE = {
  "llama3_8b_instruct.py": ((1, 16, 1, 1), _llama(32, 4096, 14336, 1024)),
  "llama3_70b_instruct.py": ((1, 16, 16, 1), _llama(80, 8192, 28672, 1024)),
  "mixtral_8x7b_instruct.py": ((1, 2, 1, 8), MIXTRAL),
  "gpt3_175b.py": ((1, 128, 2, 1), (GPT3, _L * 4 * 4 * _D)),
}


@pytest.mark.parametrize("spec", LARGE)
def test_large_models_have_the_sizes_that_are_known(spec):
  mesh, (whole, trained) = LARGE[spec]
  wanted = config_dict.convert(config_flag.load(spec))
  made = abstract.abstract(wanted, _mesh(*mesh))
  assert _sizes(made.base.params) == whole
  assert _sizes(made.state.trained) == trained
  assert f"training {trained:,} of {whole:,} parameters" in "\n".join(made.notes)
  assert f"{whole:,} parameters" in config_flag.names()[spec[:-3]].read_text()
  assert f"{trained:,} are trained" in config_flag.names()[spec[:-3]].read_text()
  assert {x.dtype.name for x in jax.tree.leaves(made.base.params)} == {"bfloat16"}
  assert {x.dtype.name for x in jax.tree.leaves(made.state.trained)} == {"float32"}
  # Cut over all chips, but for a table that does not come out even; where there is an
  # axis for experts, what is no expert is not cut along it.
  on_all = _EXPERTS if mesh[-1] > 1 else whole
  cut = on_all / math.prod(mesh) + (whole - on_all) / math.prod(mesh[:-1])
  assert _bytes_on_each(made.base.params) < 1.05 * 2 * cut
  ids = made.batch["input_ids"]
  assert ids.shape == (wanted.train.batch_size, wanted.data.max_length)
  assert ids.sharding.shard_shape(ids.shape)[0] == ids.shape[0] // (mesh[1] * mesh[3])


def test_the_totals_are_those_that_the_models_publish():
  assert LARGE["llama3_8b_instruct.py"][1][0] == 8_030_261_248
  assert LARGE["llama3_70b_instruct.py"][1][0] == 70_553_706_496
  assert LARGE["mixtral_8x7b_instruct.py"][1][0] == 46_702_792_704


@pytest.mark.parametrize("spec", LARGE)
def test_trained_in_full_all_weights_have_masters_and_moments(spec):
  mesh, (whole, _) = LARGE[spec]
  wanted = config_dict.convert(config_flag.load(f"{spec}:full"))
  made = abstract.abstract(wanted, _mesh(*mesh))
  assert _sizes(made.state.trained) == whole
  assert 3 * 4 * whole <= sum(
    x.size * x.dtype.itemsize
    for x in jax.tree.leaves((made.state.trained, made.state.opt_state))
  )
  assert made.plan.targets == ()


def test_a_scanned_program_does_not_grow_with_its_layers():
  texts = []
  for layers in (12, 96):
    config = config_flag.load("gpt3_175b.py")
    config.model.hf_config.n_layer = layers
    config.mesh.fsdp = config.mesh.tensor = 1
    wanted = config_dict.convert(config)
    made = abstract.abstract(wanted, jax.devices()[:1])
    texts.append(made.lower().as_text())
  assert texts[0] != texts[1]
  assert len(texts[0].splitlines()) == len(texts[1].splitlines())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("abstract")
  for name in ("gpt2", "bert"):
    peers.tiny(name, folder / name)
  token_ids.write(folder / "data", token_ids.rows(9, 0), token_ids.rows(3, 1))
  return folder


def _wanted(kind, folder, **changes):
  values = {"train.steps": 1000, "train.warmup_steps": 100, "data.max_length": 16}
  if kind == "gpt2":
    return token_ids.shrunk(
      "gpt3_175b.py", folder / kind, folder / "data", **(values | changes)
    )
  values |= {"data.task": "stsb", "data.path": None, "lora.tuned": ("classifier",)}
  values |= {"lora.targets": "all-linear", "model.dropout": None, "lora.dropout": 0.1}
  values |= {"train.label_smoothing": 0.0, "train.accumulation": 2}
  return token_ids.shrunk("quickstart.py", folder / kind, None, **(values | changes))


def _pairs(count, seed):
  rng = np.random.default_rng(seed)
  words = peers.WORDS.split()[4:]
  for _ in range(count):
    text, other = (" ".join(rng.choice(words, n)) for n in (6, 7))
    yield {"text": text, "text_pair": other, "label": float(rng.uniform(0, 5))}


@pytest.mark.parametrize(
  ("kind", "changes"), [("gpt2", {}), ("gpt2", {"data.packing": True}), ("bert", {})]
)
def test_the_abstract_step_is_the_very_step_that_trains(
  kind, changes, folder, monkeypatch
):
  splits = Splits(list(_pairs(9, 0)), {"validation": list(_pairs(3, 1))})
  monkeypatch.setattr(classification.data, "load", lambda *args, **kwargs: splits)
  wanted = _wanted(kind, folder, **changes)
  real = run.prepare({Path(): wanted})
  plan, mesh = durations(wanted.train, real.data.steps_per_epoch), real.model.mesh
  program = loop.program_of(real, plan)
  state, base = program.start()
  rows = meshes.batch(mesh)
  batch = {n: meshes.place(x, rows) for n, x in next(real.data.batches).items()}
  made = abstract.abstract(wanted, mesh)
  _check_like((state, base, batch), (made.state, made.base, made.batch))
  with jax.set_mesh(mesh):
    want = program.step.lower(state, base, batch).as_text()
  assert made.lower().as_text() == want
  other = abstract.abstract(_wanted(kind, folder, **changes, **{"lora.rank": 2}), mesh)
  assert other.lower().as_text() != want


def _check_like(arrays, shapes):
  assert jax.tree.structure(arrays) == jax.tree.structure(shapes)
  for x, like in zip(jax.tree.leaves(arrays), jax.tree.leaves(shapes), strict=True):
    assert (x.shape, x.dtype) == (like.shape, like.dtype)
    assert x.sharding.is_equivalent_to(like.sharding, x.ndim)


def test_a_folder_with_config_json_alone_is_enough(folder, tmp_path):
  shutil.copy(folder / "gpt2/config.json", tmp_path)
  wanted = _wanted("gpt2", folder, **{"model.path": str(tmp_path), "data.path": None})
  found = abstract.abstract(wanted, jax.devices()[:1])
  assert found.model.config.n_embd == 16


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model.path": "nowhere/at/all"}, "no folder nowhere/at/all"),
    ({"train.batch_size": 6}, "train.batch_size is 6, and can't be spread evenly"),
    ({"data.max_length": 23}, "takes at most 22 tokens"),
    ({"model.hf_config": {"model_type": "gtp2"}}, "did you mean 'gpt2'"),
    ({"model.hf_config": {"model_type": "bert"}}, "trains a causal-lm model"),
    ({"lora.targets": ".*/q_proj/kernel"}, "q_proj"),
    ({"model.param_dtype": "int8"}, "unknown model.param_dtype 'int8'"),
  ],
)
def test_what_does_not_fit_is_an_error(folder, changes, message):
  with pytest.raises(LoraxError, match=message):
    abstract.abstract(_wanted("gpt2", folder, **changes), _mesh(1, 4, 1, 1))


@pytest.mark.parametrize(
  ("spec", "changes", "message"),
  [
    ("mixtral_8x7b_instruct.py", {}, "the tokens of this mixtral can't be sharded"),
    (
      "llama3_8b_instruct.py",
      {"data.max_length": 2050},
      "data.max_length is 2050, and can't be split evenly over the 4 devices",
    ),
    (
      "llama3_8b_instruct.py",
      {"soft.method": "prefix"},
      "tokens can't be sharded with soft.method=prefix",
    ),
  ],
)
def test_tokens_that_can_not_be_sharded_are_an_error(spec, changes, message):
  config = config_flag.load(spec)
  for name, value in changes.items():
    section, field = name.split(".")
    with config.unlocked():
      config[section][field] = value
  with pytest.raises(LoraxError, match=message):
    abstract.abstract(config_dict.convert(config), _mesh(1, 4, 1, 1, 4))

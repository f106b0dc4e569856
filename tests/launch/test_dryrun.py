"""The dry run, on models that compile at once."""

import dataclasses
import functools
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import common
from experiments.cli import config_dict, config_flag
from launch.dryrun import costs, hlo, options, run, suggest
from launch.dryrun import step as shapes
from launch.dryrun import topology as topologies
from lorax_flax.errors import LoraxError
from lorax_flax.jobs.abstract import abstract
from lorax_flax.models.remat import REMAT
from lorax_flax.sharding import mesh as meshes
from lorax_flax.train import step as steps

pytest.importorskip("libtpu")

ROOT = Path(__file__).parents[2]
LAYERS, HIDDEN, MLP, VOCAB, HEADS = 2, 256, 512, 512, 4
BATCH, LENGTH, RANK = 8, 128, 8
_CONFIG = f"""
from ml_collections import ConfigDict
from experiments.configs import common


def get_config():
  config = common.next_token()
  config.model.path = "nowhere"
  config.model.hf_config = ConfigDict(dict(
    model_type="llama", vocab_size={VOCAB}, hidden_size={HIDDEN},
    num_hidden_layers={LAYERS}, num_attention_heads={HEADS},
    num_key_value_heads={HEADS}, intermediate_size={MLP},
    max_position_embeddings=1024, rms_norm_eps=1e-5, rope_theta=10000.0,
    tie_word_embeddings=False,
  ))
  config.data.max_length = {LENGTH}
  config.lora.targets = "all-linear"
  config.lora.rank = {RANK}
  config.train.steps = 10
  config.train.batch_size = {BATCH}
  config.train.eval_batch_size = {BATCH}
  return config
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  file = tmp_path_factory.mktemp("config") / "tiny.py"
  file.write_text(_CONFIG)
  return file


@pytest.fixture(scope="module")
def wanted(config):
  return config_dict.convert(config_flag.load(str(config)))


@functools.cache
def _topology(name):
  return topologies.describe(name)


def _with(wanted, *sizes, **model):
  return dataclasses.replace(
    wanted,
    mesh=meshes.MeshConfig(*sizes),
    model=dataclasses.replace(wanted.model, **model),
  )


@pytest.fixture(scope="module")
def measured(wanted):
  """(slice, chips along data, fsdp and tensor) -> the costs of the step there."""
  useful = shapes.useful_flops(wanted, _topology("v5e:2x2"))

  @functools.cache
  def of(name, *sizes):
    where = _topology(name)
    job = abstract(_with(wanted, *sizes), where.devices)
    return costs.measure(job, where, useful)[0]

  return of


def _kernels():
  """Sizes of a layer's kernels, (in, out)."""
  return [*4 * [(HIDDEN, HIDDEN)], *2 * [(HIDDEN, MLP)], (MLP, HIDDEN)]


def test_the_flops_needed_are_those_of_the_formula(wanted):
  """4 for each parameter and token; factors train too; attention both ways."""
  tokens = BATCH * LENGTH
  kernels = sum(n * m for n, m in _kernels())
  factors = sum((n + m) * RANK for n, m in _kernels())
  attention = 2 * LENGTH * HIDDEN  # Scores and their use, a token.
  want = 2 * tokens * LAYERS * (2 * kernels + 3 * factors + 3 * attention)
  want += 2 * 2 * tokens * HIDDEN * VOCAB
  got = shapes.useful_flops(_with(wanted, 1, 4, 1), _topology("v5e:2x2"))
  assert got == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize(
  ("name", "sizes"),
  [
    ("v5e:2x2", (1, 2, 2)),
    ("v4:2x2x1", (2, 2, 1)),
    ("v6e:2x2", (1, 1, 4)),
  ],
)
def test_the_costs_of_a_step_are_those_of_its_parts(measured, name, sizes):
  c = measured(name, *sizes)
  chip = _topology(name).chip
  # What is recomputed is the forward pass, less its last product and the head; and by
  # attention's kernel its logits, twice, and their gradient.
  assert c.useful <= 0.85 * c.flops
  assert c.flops <= 1.55 * c.useful
  assert c.compute == c.flops / chip.flops
  assert c.seconds == max(c.compute, c.memory, c.network) > 0
  assert 0 < c.utilization <= 1
  # Every weight is read at least once, from memory that it fits into.
  assert c.hbm > 0
  assert c.peak < 2**28 < chip.hbm
  trained = sum((n + m) * RANK for n, m in _kernels()) * LAYERS * 4
  cut = math.prod(sizes[1:])
  assert trained / cut <= c.arguments.adapter <= trained
  assert c.arguments.optimizer == pytest.approx(2 * c.arguments.adapter, rel=0.01)
  # The compiler's own sum of arguments, but for what its tiles waste.
  total = c.arguments.total + c.padding
  assert c.padding <= 0.35 * total
  assert set(c.sent) <= set(hlo.KINDS)
  assert c.network > 0


def test_tensor_parallelism_gathers_no_kernel(measured):
  """Nor anything else that is as large as one."""
  c = measured("v6e:2x2", 1, 1, 4)
  smallest = min(n * m for n, m in _kernels()) * 2
  assert c.sent.get("all-gather", 0.0) < smallest


def test_the_compilers_fusions_of_collectives_hide_none():
  where = _topology("v5e:2x2")
  mesh = meshes.make(meshes.MeshConfig(1, 4, 1), where.devices)
  shape = common.Shape(2, 256, 4, 512, 512, batch=8, length=128)
  job = common.job(
    shape, "query_value", dtype="bfloat16", scan=True, abstract=True, mesh=mesh
  )
  lowered, found = job.lower(), []
  with topologies.quiet():
    for fused in ("true", "false"):
      options = {"xla_tpu_enable_async_collective_fusion": fused}
      found.append(lowered.compile(compiler_options=options).as_text())
  starts = ["AsyncCollectiveStart" in text for text in found]
  assert starts == [True, False]

  def sent(text):
    kinds = {}
    for c in hlo.collectives(text):
      kinds[c.kind] = kinds.get(c.kind, 0) + c.sent
    return kinds

  assert sent(found[0]) == sent(found[1])
  assert hlo.matmul_flops(found[0]) == hlo.matmul_flops(found[1])


def _command(config, *flags):
  return subprocess.run(
    [
      *(sys.executable, "-m", "launch.dryrun", f"--config={config}"),
      *flags,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_command_prints_the_table_and_nothing_on_standard_error(config):
  done = _command(config, "--topology=v5e:2x2", "--config.mesh.tensor=2")
  assert done.returncode == 0, done.stderr
  assert done.stderr == ""
  for words in (
    *("tiny.py on v5e:2x2", "weights", "adapter", "optimiser", "activations"),
    "attention",
    *("peak HBM", "of 16.00 GiB", "matmul FLOPs", "all-gather", "all-reduce"),
    *("bound by", "utilisation (MFU)", "tokens/s", "8 × 128 a step, 4 chips"),
  ):
    assert words in done.stdout
  assert "fsdp 2 × tensor 2" in done.stdout


def test_a_step_that_does_not_fit_says_so_with_both_figures(wanted, capsys):
  train = dataclasses.replace(wanted.train, batch_size=2**16, eval_batch_size=8)
  huge = dataclasses.replace(_with(wanted, 1, 4, 1, remat="none"), train=train)
  with pytest.raises(LoraxError, match=r"at least [\d.]+ GiB .* are 15\.\d+ GiB"):
    run.run(huge, _topology("v5e:2x2"), "huge")
  assert "activations, padding" in capsys.readouterr().out


def test_arguments_that_do_not_fit_need_no_compiler(wanted, capsys):
  table = dict(wanted.model.hf_config, vocab_size=2**20, hidden_size=2**15)
  with pytest.raises(LoraxError, match=r"its arguments need at least \d+"):
    run.run(_with(wanted, 1, 4, 1, hf_config=table), _topology("v5e:2x2"), "huge")
  assert "weights" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("message", "used", "available"),
  [
    ("Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.", 20.5, 15.75),
    (
      "memory required for HLO temporaries (32.35G) exceeds available HBM (512.0M).",
      *(32.35, 0.5),
    ),
  ],
)
def test_what_the_compiler_says_of_too_much_is_understood(message, used, available):
  found = costs._too_large(message)
  assert found is not None
  assert found.used == used * 2**30
  assert found.available == available * 2**30


def test_a_batch_that_does_not_come_out_even_is_refused(wanted):
  with pytest.raises(LoraxError, match=r"train\.batch_size is 8, and can't be spread"):
    run.run(wanted, _topology("v5e:4x4"), "title")


def test_a_sharded_kernel_is_gathered_before_its_product():
  topology = _topology("v5e:4x4")
  mesh = meshes.make(meshes.MeshConfig(fsdp=16), topology.devices)
  rows = NamedSharding(mesh, PartitionSpec("fsdp"))
  kernel = jax.ShapeDtypeStruct((4096, 14336), jnp.bfloat16, sharding=rows)
  x = jax.ShapeDtypeStruct((16, 2048, 4096), jnp.bfloat16, sharding=rows)
  state = jax.ShapeDtypeStruct((), jnp.int32, sharding=meshes.replicated(mesh))
  step = steps.jitted(
    lambda state, x, w: (state, jnp.tanh(x @ w).sum()), meshes.replicated(mesh)
  )
  with jax.set_mesh(mesh):
    text = step.lower(state, x, kernel).compile().as_text()
  assert {c.kind for c in hlo.collectives(text)} == {"all-gather", "all-reduce"}


# Suggestions


@pytest.fixture
def pretend(monkeypatch):
  """Compilations of which a function says the memory (GiB) and the seconds."""

  def job(wanted, devices):
    sizes = wanted.mesh.sizes(len(devices))
    ids = jax.ShapeDtypeStruct((wanted.train.batch_size, LENGTH), int)
    return SimpleNamespace(
      sizes=sizes, remat=wanted.model.remat, batch={"input_ids": ids}
    )

  def install(fits):
    compiled = []

    def measure(job, topology, useful):
      rows = job.batch["input_ids"].shape[0]
      compiled.append((job.sizes, job.remat, rows))
      gib, seconds = fits(job.sizes, job.remat, rows)
      if gib > 16:
        raise costs.TooLarge(gib * 2**30, 16 * 2**30)
      parts = costs.Arguments(gib * 2**30, 0.0, 0.0, 0.0)
      times = (seconds, seconds / 2, seconds / 3)
      return costs.Costs(parts, 0, 0, 0, 0, useful, useful, 1, {}, {}, {}, *times), ""

    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(suggest, "abstract", job)
    monkeypatch.setattr(shapes, "useful_flops", lambda wanted, topology: 1e12)
    monkeypatch.setattr(costs, "measure", measure)
    return compiled

  return install


def _rows(out):
  lines = [line for line in out.splitlines() if re.match(r"\d+×\d+×", line)]
  return [re.split(r"\s{2,}", line) for line in lines]


def test_suggestions_are_ranked_and_those_that_do_not_fit_are_last(
  wanted, pretend, capsys
):
  def fits(sizes, remat, rows):
    # Copies cost memory and tensor time; a batch costs some of both.
    kept = dict(zip(REMAT, (8, 4, 2, 1.5, 1, 0), strict=True))[remat]
    gib = 4 * sizes[0] + rows / 8 + kept
    return gib, 1.0 + sizes[2] + rows / 100 + (kept < 4)

  compiled = pretend(fits)
  suggest.run(wanted, _topology("v5e:2x2"), "title", minutes=1)
  rows = _rows(capsys.readouterr().out)
  rates = [float(row[3].replace(",", "")) for row in rows if row[-1] != "no"]
  assert rates == sorted(rates, reverse=True)
  # All of the batch that fits, nothing recomputed that need not be.
  assert rows[0][:3] == ["1×4×1×1×1", "inputs", "32"]
  assert rows[-1][0] == "4×1×1×1×1"
  assert rows[-1][-1] == "no"
  assert rows[-1][-2] == "18.00"
  assert {row[1] for row in rows} == set(REMAT)
  # What needs more than something that does not fit is not compiled.
  assert len(compiled) == len(set(compiled)) == len(rows)
  assert ((1, 4, 1, 1, 1), "none", 64) not in compiled


def test_what_time_did_not_suffice_for_is_said(wanted, pretend, monkeypatch, capsys):
  pretend(lambda *option: (1.0, 1.0))
  times = iter([0.0, 0.0, *100 * [61.0]])
  monkeypatch.setattr(suggest.time, "monotonic", lambda: next(times))
  suggest.run(wanted, _topology("v5e:2x2"), "title", minutes=1)
  assert "others were not tried: --minutes=1 had passed" in capsys.readouterr().out


def test_every_way_to_cut_the_chips_is_thought_of():
  found = options.meshes(8)
  assert len(found) == len(set(found)) == 10
  assert all(math.prod(sizes) == 8 for sizes in found)
  assert found[0] == (1, 8, 1, 1, 1)
  cut = options.meshes(8, experts=12)
  assert len(cut) == len(set(cut)) == 10 + 6 + 3
  assert all(math.prod(sizes) == 8 and 12 % sizes[3] == 0 for sizes in cut)


def test_long_rows_are_sharded_too():
  assert options.meshes(4, tokens=4095) == options.meshes(4)
  found = options.meshes(4, tokens=8192)
  assert len(found) == len(set(found)) == 6 + 3 + 1
  assert all(math.prod(sizes) == 4 for sizes in found)
  assert max(sizes[4] for sizes in options.meshes(4, tokens=4096)) == 2

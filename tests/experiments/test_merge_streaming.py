"""Merging a leaf at a time: what it holds, and the forms that it writes."""

import json
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

from experiments.merge import merge
from lorax_flax.adapt.paths import flatten
from lorax_flax.hub.checkpoints import export
from lorax_flax.hub.files import safetensors_writer
from lorax_flax.models import registry
from tests.experiments import commands, own_text, peers

FORMS = ("transformers", "orbax", "stablehlo")
# Of the largest leaf's size: as it is read, merged, and on its way to the file.
MOST_LEAVES = 3
LEAVES = 16 * 9 + 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("streaming")
  own_text.decoder(root / "base", width=64)
  config = transformers.AutoConfig.from_pretrained(root / "base")
  config.num_hidden_layers = 16
  model = transformers.LlamaForCausalLM(config)
  model.save_pretrained(root / "base")
  fields = {"modules_to_save": None, "target_modules": ["q_proj", "down_proj"], "r": 1}
  peers.adapt(model, root / "adapter", **fields)
  return root


@pytest.fixture(scope="module")
def written(root):
  """What was held while each form was written, by form."""
  patch, found = pytest.MonkeyPatch(), {}
  check = export.check_finite
  for form in FORMS:
    held = []

    def noted(path, value, held=held):
      if not held:
        tracemalloc.start()  # of NumPy's copies, of which the last tensor sees all
      held.append(_live() + (_numpy() if len(held) == LEAVES - 1 else 0))
      check(path, value)

    with patch.context() as patched:
      patched.setattr(export, "check_finite", noted)
      before = _live()
      receipt = _merge(root, form, probe=False)
      tracemalloc.stop()
    assert receipt["stored"]["kept"] == pytest.approx(1, abs=1e-3)
    assert receipt["stored"]["largest_logit_difference"] is None
    found[form] = max(held) - before, len(held)
  return found


def _merge(root, form, **options):
  folders = (str(root / name) for name in ("base", "adapter", f"out_{form}"))
  return merge(*folders, form, **options)


def _live():
  """Bytes of all arrays on devices."""
  return sum(x.nbytes for x in jax.live_arrays())


def _numpy():
  """Bytes of NumPy's own arrays since tracemalloc was started."""
  numpy = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
  traces = tracemalloc.take_snapshot().filter_traces([numpy])
  return sum(each.size for each in traces.statistics("filename"))


def _params(folder):
  return registry.load(folder).params


@pytest.mark.parametrize("form", FORMS)
def test_a_few_leaves_are_held_at_once(root, written, form):
  leaves = flatten(_params(root / "base"))
  sizes = [leaf.nbytes for leaf in leaves.values()]
  held, count = written[form]
  assert count == len(leaves) == LEAVES
  bound = MOST_LEAVES * max(sizes)
  assert bound < sum(sizes) / 2, "a model of few leaves says nothing"
  assert held < bound


def test_orbax_alone_restores_the_tree_of_the_merged_checkpoint(
  root, written, monkeypatch
):
  monkeypatch.chdir(root / "out_orbax")
  found = {}
  exec(Path("README.md").read_text().split("```python")[1].split("```")[0], found)
  want = _params(root / "out_transformers")
  assert jax.tree.structure(found["params"]) == jax.tree.structure(want)
  assert jax.tree.all(jax.tree.map(np.array_equal, found["params"], want))
  config = json.loads(Path("config.json").read_text())
  assert registry.outline(config).module == registry.load(root / "base").module
  assert Path("tokenizer.json").is_file()


def test_a_large_checkpoint_is_split_as_transformers_reads_it(
  root, written, monkeypatch
):
  monkeypatch.setattr(safetensors_writer, "_SHARD", 100_000)
  (root / "split").mkdir()
  loaded = registry.load(root / "out_transformers")
  leaves = flatten(loaded.params)
  export.write_safetensors(root / "split", leaves, loaded.keymap)
  files = [*(root / "split").glob("*.safetensors")]
  assert len(files) > 3
  assert all(file.stat().st_size < 100_000 + 4096 for file in files)
  (root / "split/config.json").write_bytes(
    (root / "out_transformers/config.json").read_bytes()
  )
  kind = transformers.LlamaForCausalLM
  got, info = kind.from_pretrained(root / "split", output_loading_info=True)
  assert not any(info.values())
  want = kind.from_pretrained(root / "out_transformers").state_dict()
  assert all(np.array_equal(x, want[key]) for key, x in got.state_dict().items())
  again = registry.load(root / "split").params
  assert jax.tree.all(jax.tree.map(np.array_equal, again, loaded.params))


def test_the_probe_can_be_left_out_of_the_command(root, tmp_path):
  flags = [f"--{name}={root / name}" for name in ("base", "adapter")]
  done = commands.run(
    "experiments.merge", *flags, f"--out={tmp_path / 'out'}", "--noprobe"
  )
  assert done.returncode == 0, done.stderr
  assert "100.0% of the change is kept, logits are not compared" in done.stdout

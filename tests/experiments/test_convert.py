"""The convert command: the way to our form and back, loralib's file, and refusals."""

import json
import re
import warnings

import jax
import numpy as np
import peft
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import lorax_flax as lx
from experiments.convert import convert, table
from experiments.merge import merge
from lorax_flax.errors import LoraxError
from lorax_flax.files import atomic
from lorax_flax.hub.adapters import any as adapters
from lorax_flax.hub.adapters import loralib
from lorax_flax.hub.adapters import native as orbax_adapter
from lorax_flax.hub.files import torch_file
from lorax_flax.hub.peft import folder as hub_peft
from lorax_flax.models import registry
from tests.experiments import commands, peers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Whatever says the same in another way: compared by what peft makes of it.
REWORDED = {"target_modules", "layers_to_transform", "rank_pattern", "alpha_pattern"}
# r and lora_alpha are defaults of the patterns; the rest says how the file came about.
REWORDED |= {"r", "lora_alpha", "modules_to_save", "auto_mapping", "peft_version"}
CASES = {
  "plain": {},
  "patterns": {
    "rank_pattern": {"value": 5, r"layer\.1\.attention\.self\.query": 2},
    "alpha_pattern": {"query": 16, "layer.0.attention.self.value": 2.5},
    "use_rslora": True,
    "lora_dropout": 0.25,
    "revision": "main",
  },
  "biases and a norm": {"bias": "all", "modules_to_save": ["LayerNorm"]},
  "one layer, no head": {"layers_to_transform": [1], "task_type": None},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bases") / "base"
  peers.tiny("roberta", folder, names=peers.NAMES)
  return folder


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
  """PEFT's folders by case, everything in them random."""
  made = {}

  def save(case):
    if case not in made:
      made[case] = tmp_path_factory.mktemp("peft") / "adapter"
      _peft_folder(base, made[case], **CASES[case])
    return made[case]

  return save


def _peft_folder(base, folder, **options):
  model = transformers.RobertaForSequenceClassification.from_pretrained(base)
  peers.adapt(model, folder, **{"target_modules": ["query", "value"], **options})


def _meaning(base, folder):
  """What peft makes of a folder's config: rank and scale of every module."""
  model = transformers.RobertaForSequenceClassification.from_pretrained(base)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.PeftModel.from_pretrained(model, folder)
  return {
    name: (module.r["default"], module.scaling["default"])
    for name, module in model.named_modules()
    if isinstance(module, peft.tuners.lora.LoraLayer)
  }


def _everything(folder):
  return {
    str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()
  }


@pytest.mark.parametrize("case", CASES)
def test_peft_to_ours_to_peft_is_the_same(case, base, saved, tmp_path):
  source, ours, back = saved(case), tmp_path / "ours", tmp_path / "back"
  convert(str(base), str(source), str(ours))
  assert sorted(p.name for p in ours.iterdir()) == [
    *(".lorax_flax.json", "adapter.json", "arrays")
  ]
  convert(str(base), str(ours), str(back), "peft")
  want, got = load_file(source / WEIGHTS), load_file(back / WEIGHTS)
  assert want.keys() == got.keys()
  for key, tensor in want.items():
    assert got[key].dtype == tensor.dtype
    assert got[key].tobytes() == tensor.tobytes(), key
  config = json.loads((source / CONFIG).read_text())
  again = json.loads((back / CONFIG).read_text())
  for name in config.keys() - REWORDED:
    assert config[name] == again[name], name
  assert _meaning(base, back) == _meaning(base, source)


def test_labels_survive_the_way(base, saved, tmp_path):
  labelled = tmp_path / "labelled"
  loaded = registry.load(base)
  adapter, config = hub_peft.read_adapter(saved("plain"), loaded.params, loaded.keymap)
  hub_peft.write_adapter(
    labelled, adapter, loaded.keymap, config, base_name="b", labels=peers.NAMES
  )
  convert(str(base), str(labelled), str(tmp_path / "ours"))
  convert(str(base), str(tmp_path / "ours"), str(tmp_path / "back"), "peft")
  assert hub_peft.read_labels(tmp_path / "back") == (list(peers.NAMES), None)
  read = adapters.read(tmp_path / "back", loaded.params, loaded.keymap)
  assert (read.base_name, read.task_type) == ("b", "SEQ_CLS")


def test_a_head_of_another_width_comes_along(base, tmp_path):
  peers.tiny("roberta", tmp_path / "five", num_labels=5)
  _peft_folder(tmp_path / "five", tmp_path / "adapter")
  keymap = registry.load(base).keymap
  convert(str(base), str(tmp_path / "adapter"), str(tmp_path / "ours"))
  assert adapters.needs(tmp_path / "ours", keymap).num_labels == 5
  convert(str(base), str(tmp_path / "ours"), str(tmp_path / "lora"), "loralib")
  assert adapters.needs(tmp_path / "lora", keymap).num_labels == 5
  back = tmp_path / "back"
  convert(str(base), str(tmp_path / "lora"), str(back), "peft", alpha=8)
  want, got = load_file(tmp_path / "adapter" / WEIGHTS), load_file(back / WEIGHTS)
  assert want.keys() == got.keys()
  assert all((want[key] == got[key]).all() for key in want)


def test_the_table_says_what_was_read(base, saved, tmp_path):
  said, keymap, _ = convert(str(base), str(saved("patterns")), str(tmp_path / "x"))
  lines = table(said, keymap).splitlines()
  assert re.split("  +", lines[0]) == [
    "module", "method", "rank", "alpha", "shapes", "dtype"
  ]  # fmt: skip
  rows = {line.split()[0]: re.split("  +", line)[1:] for line in lines[1:]}
  name = "roberta.encoder.layer.{}.attention.self.{}"
  assert rows[name.format(1, "query")] == ["LoRA", "2", "16", "16×2 2×16", "float32"]
  assert rows[name.format(0, "value")] == ["LoRA", "5", "2.5", "16×5 5×16", "float32"]
  assert len(lines) == 1 + 4 + 4


@pytest.mark.parametrize("form", ["peft", "orbax", "loralib"])
def test_an_adapter_there_is_kept_unless_told(form, base, saved, tmp_path):
  flags = (str(base), str(saved("plain")), str(tmp_path / "x"), form)
  convert(*flags)
  before = _everything(tmp_path / "x")
  with pytest.raises(LoraxError, match="exists and is not empty"):
    convert(*flags)
  convert(*flags, overwrite=True)
  assert before.keys() & _everything(tmp_path / "x").keys()


def test_other_things_there_are_never_replaced(base, saved, tmp_path):
  (tmp_path / "x").mkdir()
  (tmp_path / "x/thesis.tex").write_text("years")
  for overwrite in (False, True):
    for form in ("peft", "orbax", "loralib"):
      with pytest.raises(LoraxError, match="exists and is not empty"):
        convert(
          str(base), str(saved("plain")), str(tmp_path / "x"), form, overwrite=overwrite
        )
  assert _everything(tmp_path / "x") == {"thesis.tex": b"years"}


def test_what_is_read_is_never_replaced(base, saved):
  source = saved("plain")
  before = _everything(source)
  with pytest.raises(LoraxError, match="which is read from"):
    convert(str(base), str(source), str(source), "peft", overwrite=True)
  assert _everything(source) == before


def _refused(message, tmp_path, *args, **options):
  """One error, and nothing is written."""
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(LoraxError, match=message) as error:
    convert(*map(str, args), **options)
  assert sorted(tmp_path.rglob("*")) == before
  return str(error.value)


def test_bad_requests_are_one_error(base, saved, tmp_path):
  source, out = saved("plain"), tmp_path / "out"
  _refused("did you mean 'loralib'", tmp_path, base, source, out, "lorlib")
  _refused("alpha is for loralib", tmp_path, base, source, out, alpha=1)
  _refused("enable_lora is for", tmp_path, base, source, out, enable_lora=[True])
  _refused("vLLM's", tmp_path, base, source, out, max_rank=8)
  _refused("no LoRA on a roberta", tmp_path, base, source, out, "vllm")
  _refused("no file or folder", tmp_path, base, tmp_path / "none", out)
  _refused("holds no adapter: no adapter_config", tmp_path, base, base, out)
  _refused(r"named adapters: adapter\. Give one", tmp_path, base, source.parent, out)
  _refused("no lora_A", tmp_path, base, base / "config.json", out)
  fits = [True, True]
  _refused("fits no", tmp_path, base, source, out, "loralib", enable_lora=fits)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_loralib_file_asks_for_alpha(suffix, base, saved, tmp_path):
  convert(str(base), str(saved("plain")), str(tmp_path / "lora"), "loralib")
  file = tmp_path / f"lora{suffix}"
  tensors = torch_file.read(tmp_path / "lora" / loralib.FILE)
  assert "roberta.encoder.layer.0.attention.self.query.lora_A" in tensors
  if suffix == ".pt":
    torch_file.write(file, tensors)
  else:
    save_file({k: np.array(v) for k, v in tensors.items()}, file)
  _refused("does not store alpha", tmp_path, base, file, tmp_path / "out")
  said, _, _ = convert(str(base), str(file), str(tmp_path / "out"), alpha=8)
  assert (said.task_type, said.base_name) == ("SEQ_CLS", str(base))
  loaded = registry.load(base)
  want = adapters.read(saved("plain"), loaded.params, loaded.keymap)
  got = adapters.read(tmp_path / "out", loaded.params, loaded.keymap)
  assert got.adapter.keys() == want.adapter.keys()
  for path, delta in want.adapter.items():
    jax.tree.map(np.testing.assert_array_equal, got.adapter[path], delta)


@pytest.fixture
def ours(base, saved, tmp_path):
  convert(str(base), str(saved("plain")), str(tmp_path / "ours"))
  return tmp_path / "ours"


def _edited(folder, edit):
  file = folder / orbax_adapter.FILE
  about = json.loads(file.read_text())
  edit(about)
  file.write_text(json.dumps(about))


QUERY = "encoder/layer_0/attention/query/kernel"


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (lambda x: x.update(format=2), "format is 2; 1 is read here"),
    (lambda x: x.pop("format"), "damaged or of another version"),
    (lambda x: x.pop("config"), "damaged or of another version"),
    (lambda x: x.update(config=[]), "damaged or of another version"),
    (lambda x: x["config"].update(rnak=3), "damaged or of another version"),
    (lambda x: x["config"].update(rank=0), "int >= 1"),
    (lambda x: x.pop("files"), "damaged or of another version"),
    (lambda x: x.update(deltas=3), "damaged or of another version"),
    (lambda x: x["deltas"][QUERY].update(method="lra"), "did you mean 'lora'"),
    (lambda x: x["deltas"].update(quer=x["deltas"][QUERY]), "unknown weight of"),
    (lambda x: x["deltas"][QUERY]["arrays"].pop("a"), "damaged or of another"),
    (
      lambda x: x["deltas"][QUERY]["arrays"].update(a=[[16, 4], "float32"]),
      r"'a' of shape \(16, 4\), and \(16, 3\) was expected",
    ),
    (
      lambda x: x["deltas"][QUERY]["arrays"].update(a=[[10**12, 3], "float32"]),
      r"\(1000000000000, 3\), and \(16, 3\)",
    ),
    (lambda x: x["deltas"][QUERY]["static"].update(roles=["in"]), "is for 1 axes"),
    (lambda x: x["deltas"][QUERY]["static"].update(layers=[0]), r"the layers \(0,\)"),
  ],
)
def test_a_damaged_description_is_one_error(edit, message, base, ours, tmp_path):
  _edited(ours, edit)
  said = _refused(message, tmp_path, base, ours, tmp_path / "out", "peft")
  assert str(ours / orbax_adapter.FILE) in said


def _widened(x):
  arrays = x["deltas"][QUERY]["arrays"]
  arrays.update(a=[[16, 10**9], "float32"], b=[[10**9, 16], "float32"])


@pytest.mark.parametrize("edit", [_widened, lambda x: x["deltas"].pop(QUERY)])
def test_arrays_are_those_that_are_described(edit, base, ours, tmp_path):
  _edited(ours, edit)
  _refused("its arrays are not those", tmp_path, base, ours, tmp_path / "out", "peft")


def test_damaged_arrays_are_one_error(base, ours, tmp_path):
  params, rng = registry.load(base).params, np.random.default_rng(0)
  arrays = ours / orbax_adapter.ARRAYS
  for file in [f for f in arrays.rglob("*") if f.stat().st_size and f.is_file()]:
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[rng.integers(len(whole))] ^= 1
    for damaged in (whole[: len(whole) // 2], flipped, None):
      file.unlink() if damaged is None else file.write_bytes(damaged)
      with pytest.raises(LoraxError, match="is damaged: not the files"):
        orbax_adapter.read_adapter(ours, params)
    file.write_bytes(whole)
  (arrays / "more").write_text("")
  _refused("not the files.*more", tmp_path, base, ours, tmp_path / "out", "peft")
  (ours / orbax_adapter.FILE).write_text("{")
  _refused("damaged", tmp_path, base, ours, tmp_path / "out", "peft")


def test_the_other_commands_take_our_form(base, saved, ours, tmp_path):
  merge(str(base), str(saved("plain")), str(tmp_path / "one"))
  merge(str(base), str(ours), str(tmp_path / "two"))
  one, two = (_everything(tmp_path / name) for name in ("one", "two"))
  assert one.keys() == two.keys()
  # The card and the receipt name the adapter.
  for name in one.keys() - {"README.md", "receipt.json", atomic.MANIFEST}:
    assert one[name] == two[name], name


def test_every_method_of_delta_is_kept(tmp_path):
  apply_fn = lambda params, x: x @ params["one"]["kernel"] + params["one"]["bias"][None]
  params = {"one": {"kernel": np.ones((3, 4), np.float32), "bias": np.ones(4, "f")}}
  x = np.ones((2, 3), np.float32)
  for options in ({"use_dora": True}, {"lora_bias": True}, {"bias": "all"}):
    config = lx.LoraConfig(targets=("one",), rank=2, dropout=0.1, **options)
    adapter = lx.adapt(apply_fn, config).init(jax.random.key(0), params, x)
    saved = orbax_adapter.Saved(adapter, config, labels=("a", "b"))
    orbax_adapter.write_adapter(tmp_path / "x", saved)
    got = orbax_adapter.read_adapter(tmp_path / "x", params)
    assert (got.config, got.labels) == (config, ("a", "b"))
    jax.tree.map(np.testing.assert_array_equal, got.adapter, adapter)


def test_the_command_prints_the_table_and_refuses_in_one_line(base, saved, tmp_path):
  flags = [f"--base={base}", f"--from={saved('plain')}", f"--to={tmp_path / 'out'}"]
  done = commands.run("experiments.convert", *flags, "--format=loralib")
  assert done.returncode == 0, done.stderr
  assert "layer.1.attention.self.value  LoRA" in done.stdout
  assert "is for lora_alpha=8, not stored there" in done.stdout
  again = commands.run(
    "experiments.convert", *flags, "--format=loralib", "--enable_lora=true,maybe"
  )
  assert again.returncode == 1
  assert again.stderr.startswith("error: ")
  assert "'maybe'" in again.stderr
  assert "Traceback" not in again.stderr

"""The combine command against peft's add_weighted_adapter: folders in, a folder out."""

import json
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from experiments import combine as command
from experiments.combine import combine
from lorax_flax.adapt import algebra
from lorax_flax.errors import LoraxError
from tests.experiments import commands, peers

WEIGHTS = (0.7, -0.3)
BOTH = ["q_proj", "down_proj"]
PRUNED = {"density": 0.6}
LINES = [{"input_ids": [3, 5, 8, 2, 11, 4]}]
# Options of ours; PEFT has other names for two.
THEIRS = {"rank": "svd_rank", "majority": "majority_sign_method"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("base")
  peers.tiny("llama", folder)
  return folder


@pytest.fixture(scope="module")
def make(base, tmp_path_factory):
  """Makes PEFT adapters of the base, each a folder."""

  def folder(seed, targets, **fields):
    model, out = _model(base), tmp_path_factory.mktemp("adapter")
    # `adapt` seeds with 1, so that the factors of another rank differ, and no others.
    fields = {"modules_to_save": None, "target_modules": targets, **fields}
    adapted = peers.adapt(model, out, **fields)
    torch.manual_seed(seed)
    with torch.no_grad():
      for parameter in adapted.parameters():
        if parameter.requires_grad:
          parameter.copy_(torch.randn_like(parameter) * 0.3)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      adapted.save_pretrained(out)
    return out

  return folder


def _model(base):
  return transformers.AutoModelForCausalLM.from_pretrained(base)


def _theirs(base, folders, combination, **options):
  """A PEFT model of the adapters, their sum active."""
  names = [f"n{i}" for i, _ in enumerate(folders)]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.PeftModel.from_pretrained(_model(base), folders[0], names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
      model.load_adapter(folder, name)
    model.add_weighted_adapter(
      names,
      [*WEIGHTS[: len(names)]],
      "sum",
      combination,
      **{THEIRS.get(n, n): value for n, value in options.items()},
    )
  model.set_adapter("sum")
  return model.eval()


def _check(base, folders, out, combination, **options):
  want = _theirs(base, folders, combination, **options)
  combined = combine(
    str(base),
    [*map(str, folders)],
    str(out),
    weights=WEIGHTS[: len(folders)],
    combination=combination,
    **options,
  )
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    got = peft.PeftModel.from_pretrained(_model(base), out).eval()
  logits = [peers.logits(model, LINES)[0] for model in (_model(base), want, got)]
  assert np.abs(logits[0] - logits[1]).max() > 1e-2
  np.testing.assert_allclose(logits[2], logits[1], rtol=1e-4, atol=1e-5)
  factors = peft.get_peft_model_state_dict(
    want, adapter_name="sum", save_embedding_layers=False
  )
  written = load_file(out / "adapter_model.safetensors")
  written = {key: x for key, x in written.items() if "lora_" in key}
  assert written.keys() == factors.keys()
  if not combination.endswith("svd"):  # whose vectors have either sign
    for key, value in written.items():
      # Theirs have zeros where not all adapters change a kernel.
      theirs = factors[key].numpy()
      mine = tuple(map(slice, value.shape))
      np.testing.assert_allclose(value, theirs[mine], rtol=1e-5, atol=1e-6)
      assert np.abs(theirs).sum() == pytest.approx(np.abs(theirs[mine]).sum())
  return combined


@pytest.mark.parametrize(
  ("combination", "options"),
  [
    ("linear", {}),
    ("magnitude_prune", PRUNED),
    ("ties", PRUNED),
    ("ties", {"majority": "frequency", **PRUNED}),
    ("cat", {}),
    ("svd", {}),
    ("svd", {"rank": 2}),
    ("magnitude_prune_svd", PRUNED),
    ("ties_svd", {"rank": 5, **PRUNED}),
    ("ties_svd", {"majority": "frequency", **PRUNED}),
  ],
)
def test_adapters_of_unlike_targets_and_scales_combine_as_in_peft(
  combination, options, base, make, tmp_path
):
  folders = [
    make(1, ["q_proj", "embed_tokens"], lora_alpha=6),
    make(2, BOTH, lora_alpha=2),
  ]
  _check(base, folders, tmp_path / "out", combination, **options)


@pytest.mark.parametrize("combination", ["cat", "svd", "ties_svd"])
def test_adapters_of_unlike_ranks_combine_as_in_peft(combination, base, make, tmp_path):
  folders = [make(1, BOTH, r=2, lora_alpha=3), make(2, BOTH, r=5, lora_alpha=4)]
  options = PRUNED if combination.startswith("ties") else {}
  combined = _check(base, folders, tmp_path / "out", combination, **options)
  lost = max(combined.errors.values(), default=0.0)
  assert lost == 0 if combination == "cat" else 0.01 < lost < 0.9


@pytest.mark.parametrize("end", ["", "_svd"])
@pytest.mark.parametrize("combination", ["dare_linear", "dare_ties"])
def test_random_entries_combine_as_in_peft_by_the_same_masks(
  combination, end, base, make, tmp_path, monkeypatch
):
  folders = [make(1, BOTH, lora_alpha=6), make(2, BOTH, lora_alpha=2)]
  mask = lambda shape, i: np.random.default_rng([*shape, i]).random(shape) < 0.6
  calls = iter(range(1000))  # in turn the first adapter's and the second's
  monkeypatch.setattr(
    torch, "bernoulli", lambda x: torch.tensor(mask(x.shape, next(calls) % 2)).float()
  )
  monkeypatch.setattr(
    algebra,
    "bernoulli",
    lambda density, seed: lambda place, shape: mask(shape[::-1], place.adapter).T,
  )
  _check(base, folders, tmp_path / "out", f"{combination}{end}", **PRUNED)
  assert next(calls) > 4


def test_one_adapter_is_scaled_as_in_peft(base, make, tmp_path):
  _check(base, [make(1, BOTH, lora_alpha=6)], tmp_path / "out", "linear")


def test_entries_are_drawn_by_the_seed(base, make, tmp_path):
  folders = [str(make(i, BOTH)) for i in (1, 2)]
  for name, seed in {"one": 0, "again": 0, "other": 1}.items():
    combine(
      str(base),
      folders,
      str(tmp_path / name),
      combination="dare_linear",
      density=0.5,
      seed=seed,
    )
  one, again, other = (
    (tmp_path / name / "adapter_model.safetensors").read_bytes()
    for name in ("one", "again", "other")
  )
  assert one == again != other


def test_rslora_is_scaled_once_and_heads_that_are_equal_stay(base, make, tmp_path):
  fields = {"use_rslora": True, "modules_to_save": ["lm_head"]}
  folder = make(1, BOTH, r=4, lora_alpha=6, **fields)
  out = tmp_path / "out"
  combine(str(base), [str(folder)] * 2, str(out), weights=[0.5, 0.5], combination="cat")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    want, got = (
      peers.logits(peft.PeftModel.from_pretrained(_model(base), f).eval(), LINES)[0]
      for f in (folder, out)
    )
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  assert json.loads((out / "adapter_config.json").read_text())["use_rslora"] is False


def test_heads_that_differ_are_refused_by_name(base, make, tmp_path):
  folders = [str(make(i, BOTH, modules_to_save=["lm_head"])) for i in (1, 2)]
  with pytest.raises(LoraxError, match=r"lm_head/kernel is trained in full.* differs"):
    combine(str(base), folders, str(tmp_path / "out"))
  assert not (tmp_path / "out").exists()


def test_ranks_that_differ_have_no_sum_of_factors_here_or_there(base, make, tmp_path):
  folders = [make(1, BOTH, r=2), make(2, BOTH, r=5)]
  with pytest.raises(ValueError, match="same r value"):
    _theirs(base, folders, "linear")
  with pytest.raises(
    LoraxError, match=r"ranks \[2, 5\] at .*kernel.*cat and the types"
  ):
    combine(str(base), [*map(str, folders)], str(tmp_path / "o"), combination="linear")


def test_the_command_prints_what_is_lost_and_refuses_in_one_line(base, make, tmp_path):
  flags = [f"--base={base}", f"--adapter={make(1, BOTH)}", f"--adapter={make(2, BOTH)}"]
  flags += ["--weights=1,0.5", "--rank=2"]
  done = commands.run("experiments.combine", *flags, f"--out={tmp_path / 'out'}")
  assert done.returncode == 0, done.stderr
  assert "4 weights, ranks 2\ncut off: at most 0." in done.stdout
  bad = commands.run(
    "experiments.combine", *flags, f"--out={tmp_path / 'no'}", "--type=tise"
  )
  assert bad.stderr.startswith(
    "error: unknown type of combination 'tise'; did you mean"
  )
  assert len(bad.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [["0.5", "x"], [""]])
def test_weights_are_numbers(words):
  with pytest.raises(LoraxError, match="--weights="):
    command._numbers(words)

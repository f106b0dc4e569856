"""PEFT adapters of every family: the same logits here and there, both ways."""

import functools
import warnings

import jax
import numpy as np
import pytest
import torch

import lorax_flax as lx
from lorax_flax.hub.peft import folder as hub_peft
from lorax_flax.models import registry
from tests.adapt.checks import perturbed
from tests.hub.peft import peers
from tests.models import decoders, family, test_distilbert, test_gpt2, test_t5, test_vit

TOLERANCE = 1e-4


def _decoder(name, **fields):
  return functools.partial(decoders.Peer(name).save, **fields), decoders.BATCH


TIED = {"tie_word_embeddings": True}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
# How each base is made, and what it is given.
BASES = {
  "distilbert": (test_distilbert.save, test_distilbert.batch()),
  "gpt2": (test_gpt2.save, test_gpt2.batch()),
  "vit": (test_vit.save, test_vit.batch()),
  "t5": (test_t5.save, test_t5.batch()),
  "t5 v1.1": (functools.partial(test_t5.save, **test_t5.V1_1), test_t5.batch()),
  "llama": _decoder("Llama"),
  "llama tied": _decoder("Llama", **TIED),
  "gemma2": _decoder("Gemma2", head_dim=4),
  "mixtral": _decoder("Mixtral", **MIXTURE),
}
HEAD = {"task_type": "SEQ_CLS"}
UNTIED = {"untie": True}
TOKENS = [5, 36, 0, 7]
# The base, PEFT's config, and how the base is loaded here.
CASES = {
  "distilbert": ("distilbert", {"target_modules": ["q_lin", "lin1"], **HEAD}, {}),
  "distilbert, words": (
    "distilbert",
    {"target_modules": ["k_lin"], "trainable_token_indices": TOKENS, **HEAD},
    {},
  ),
  "gpt2, default": ("gpt2", {}, {}),
  "gpt2, all-linear": ("gpt2", {"target_modules": "all-linear", "bias": "all"}, {}),
  "gpt2, dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True}, {}),
  "gpt2, tokens": ("gpt2", {"trainable_token_indices": TOKENS}, {}),
  "gpt2, wte alone": ("gpt2", {"target_modules": ["wte", "c_attn"]}, UNTIED),
  "gpt2, head alone": ("gpt2", {"target_modules": ["lm_head"]}, UNTIED),
  "vit": (
    "vit",
    {
      "target_modules": ["projection", "q_proj", "fc1"],
      "modules_to_save": ["classifier"],
      "lora_bias": True,
    },
    {},
  ),
  "vit, dora": (
    "vit",
    {"target_modules": ["projection", "v_proj"], "use_dora": True},
    {},
  ),
  "vit, all-linear": ("vit", {"target_modules": "all-linear"}, {}),
  "vit, embeddings saved": (
    "vit",
    {"target_modules": ["fc2"], "modules_to_save": ["vit.embeddings"]},
    {},
  ),
  "t5, default": ("t5", {}, {}),
  "t5, all-linear": ("t5", {"target_modules": "all-linear"}, {}),
  "t5, tokens": ("t5", {"trainable_token_indices": TOKENS}, {}),
  "t5 v1.1, all-linear": ("t5 v1.1", {"target_modules": "all-linear"}, {}),
  "t5 v1.1, head": ("t5 v1.1", {"target_modules": ["lm_head", "wi_1"]}, {}),
  "llama, default": ("llama", {}, {}),
  "llama, all-linear": ("llama", {"target_modules": "all-linear"}, {}),
  "llama, embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}, {}),
  "llama, embeddings saved": (
    "llama",
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    {},
  ),
  "llama, tokens of both": (
    "llama",
    {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [3]}},
    {},
  ),
  "tied, by the embedding": (
    "llama tied",
    {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    {},
  ),
  "tied, by the head": (
    "llama tied",
    {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
    {},
  ),
  "tied, by an expression": (
    "llama tied",
    {"target_modules": ".*(embed_tokens|q_proj)", "ensure_weight_tying": True},
    {},
  ),
  "tied, saved": (
    "llama tied",
    {
      "target_modules": ["q_proj"],
      "modules_to_save": ["lm_head"],
      "ensure_weight_tying": True,
    },
    {},
  ),
  "tied, tokens": ("llama tied", {"trainable_token_indices": TOKENS}, {}),
  "tied, the same tokens twice": (
    "llama tied",
    {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
    {},
  ),
  "tied, embedding alone": (
    "llama tied",
    {"target_modules": ["embed_tokens", "q_proj"]},
    UNTIED,
  ),
  "tied, embedding saved alone": (
    "llama tied",
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    UNTIED,
  ),
  "tied, other tokens in the head": (
    "llama tied",
    {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [2]}},
    UNTIED,
  ),
  "gemma2, embedding": (
    "gemma2",
    {"target_modules": ["embed_tokens", "o_proj"], "ensure_weight_tying": True},
    {},
  ),
  "gemma2, tokens": ("gemma2", {"trainable_token_indices": TOKENS}, {}),
  "mixtral": (
    "mixtral",
    {
      "target_modules": ["q_proj"],
      "target_parameters": ["gate_up_proj", "experts.down_proj", "gate.weight"],
      "rank_pattern": {"mlp.experts.down_proj": 3},
    },
    {},
  ),
  "mixtral, all-linear": ("mixtral", {"target_modules": "all-linear"}, {}),
}
# Forms that merging does not show, or that the transform must follow on its way.
APPLIED = (
  "gpt2, tokens",
  "vit",
  "tied, by the head",
  "tied, other tokens in the head",
  "mixtral",
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  """By name: the folder and the torch model; made once."""
  made = {}

  def get(name):
    if name not in made:
      folder = tmp_path_factory.mktemp("base")
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made[name] = folder, BASES[name][0](folder)
    return made[name]

  return get


@pytest.fixture(scope="module")
def loaded(bases):
  """By name, scan and untie: the model here, and its function, compiled once."""
  made = {}

  def get(name, scan, untie):
    key = name, scan, untie
    if key not in made:
      found = registry.load(bases(name)[0], scan=scan, untie=untie)
      apply = jax.jit(lambda p, inputs: found.module.apply({"params": p}, **inputs))
      made[key] = found, apply
    return made[key]

  return get


def _torch(model, inputs):
  with torch.no_grad():
    return model(**family.tensors(inputs)).logits.numpy()


def _real(inputs):
  for name in ("decoder_attention_mask", "attention_mask"):
    if name in inputs and "pixel_values" not in inputs:
      return inputs[name] == 1
  return ...


@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_peft_gives_its_logits_here_and_comes_back(
  bases, loaded, case, tmp_path
):
  name, config, options = CASES[case]
  folder, base = bases(name)
  inputs = BASES[name][1]
  picked = ... if name in ("distilbert", "vit") else _real(inputs)
  model = peers.adapted(base, **{"base_model_name_or_path": str(folder), **config})
  theirs = peers.save(model, tmp_path / "theirs")
  want = _torch(model, inputs)
  assert np.abs(want - _torch(base, inputs))[picked].max() > 0.05
  for scan in (False, True):
    found, apply = loaded(name, scan, options.get("untie", False))
    ours = tmp_path / f"ours-{scan}"
    adapter = peers.round_trip(theirs, ours, found.params, found.keymap)
    if case in APPLIED:
      _, config = hub_peft.read_adapter(theirs, found.params, found.keymap)
      lora = lx.adapt(apply, config)
      got = jax.jit(lora.apply)(found.params, adapter, inputs)
    else:
      got = apply(lx.merge(found.params, adapter), inputs)
    np.testing.assert_allclose(got[picked], want[picked], atol=TOLERANCE, rtol=1e-4)
  back = _torch(peers.load(base, tmp_path / "ours-False"), inputs)
  np.testing.assert_allclose(back, want, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "llama", "t5", "gpt2", "vit"])
def test_all_linear_means_what_peft_writes_it_out_to(bases, loaded, name, tmp_path):
  keymap = loaded(name, True, False)[0].keymap
  model = peers.adapted(bases(name)[1], target_modules="all-linear")
  theirs = hub_peft.from_peft(peers.save(model, tmp_path / "peft"), keymap)
  raw = {"peft_type": "LORA", "target_modules": "all-linear", "r": 4}
  each, rest = peers.meaning(hub_peft.from_peft(raw, keymap))
  assert (each, rest) == peers.meaning(theirs)
  assert each


def test_an_expression_that_may_mean_experts_is_refused(loaded):
  keymap = loaded("mixtral", False, False)[0].keymap
  raw = {"peft_type": "LORA", "target_modules": ".*(q_proj|down_proj)"}
  with pytest.raises(lx.LoraxError, match="may or may not mean the experts"):
    hub_peft.from_peft(raw, keymap)


def test_a_base_without_a_shared_head_has_nothing_to_untie(bases):
  for name in ("distilbert", "llama"):
    with pytest.raises(lx.LoraxError, match="no tied tables"):
      registry.load(bases(name)[0], untie=True)


SHARED = {
  "gpt2": ("wte", "c_proj"),
  "llama tied": ("embed_tokens", "q_proj"),
  "t5": ("shared", "wo"),
}


@pytest.mark.parametrize(
  ("name", "kind"),
  [
    (name, kind)
    for name in SHARED
    for kind in ("LoRA", "Tuned", "Rows")
    if (name, kind) != ("t5", "Tuned")
  ],
)
def test_a_shared_table_adapted_here_is_shared_in_peft(
  bases, loaded, name, kind, tmp_path
):
  _, base = bases(name)
  inputs, (table, linear) = BASES[name][1], SHARED[name]
  found, apply = loaded(name, False, False)
  more = {
    "LoRA": {"targets": [table, linear]},
    "Tuned": {"targets": [linear], "tuned": [table]},
    "Rows": {"targets": [linear], "rows": {table: TOKENS}},
  }[kind]
  config = lx.LoraConfig(rank=3, alpha=5.0, **more)
  lora = lx.adapt(apply, config)
  start = lora.init(jax.random.key(0), found.params, inputs)
  adapter = perturbed(start)
  hub_peft.write_adapter(
    tmp_path / "out", adapter, found.keymap, config, task_type="CAUSAL_LM"
  )
  picked = _real(inputs)
  want = apply(lx.merge(found.params, adapter), inputs)
  got = _torch(peers.load(base, tmp_path / "out"), inputs)
  np.testing.assert_allclose(got[picked], want[picked], atol=TOLERANCE, rtol=1e-4)
  again, _ = hub_peft.read_adapter(tmp_path / "out", found.params, found.keymap)
  jax.tree.map(np.testing.assert_array_equal, again, adapter)


@pytest.mark.parametrize(
  ("name", "config", "message"),
  [
    ("llama tied", {"target_modules": ["lm_head"]}, "embed_tokens.*load it with untie"),
    ("llama tied", {"target_modules": ["embed_tokens"]}, "lm_head.*untie=True"),
    (
      "llama tied",
      {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
      "untie=True",
    ),
    (
      "llama tied",
      {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
      "trainable_token_indices differ.*untie=True",
    ),
    (
      "llama tied",
      {"target_modules": ["lm_head"], "ensure_weight_tying": True, "use_dora": True},
      "a magnitude each",
    ),
    ("t5", {"target_modules": ["encoder.embed_tokens"]}, "shares its weight with"),
  ],
)
def test_one_use_of_a_shared_weight_is_refused_with_the_way_out(
  bases, loaded, name, config, message, tmp_path
):
  _, base = bases(name)
  theirs = peers.save(peers.adapted(base, **config), tmp_path / "theirs")
  found, _ = loaded(name, False, False)
  with pytest.raises(lx.LoraxError, match=message):
    hub_peft.read_adapter(theirs, found.params, found.keymap)


def test_a_table_of_t5_in_full_is_refused_since_peft_cannot_run_it(loaded, tmp_path):
  found, apply = loaded("t5", False, False)
  config = lx.LoraConfig(targets=["wo"], tuned=["shared"])
  lora = lx.adapt(apply, config)
  adapter = lora.init(jax.random.key(0), found.params, BASES["t5"][1])
  with pytest.raises(
    lx.LoraxError, match=r"a linear layer in the place of .*embed_tok"
  ):
    hub_peft.write_adapter(
      tmp_path / "out", adapter, found.keymap, config, task_type="SEQ_2_SEQ_LM"
    )

"""PEFT models in torch, their folders, and what a folder must be after a round trip."""

import copy
import dataclasses
import re
import warnings

import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file

import lorax_flax as lx
from lorax_flax.adapt.paths import flatten
from lorax_flax.adapt.targets import first_match
from lorax_flax.hub.peft import config_file
from lorax_flax.hub.peft import folder as hub_peft
from lorax_flax.hub.peft.modules import tensors
from lorax_flax.models.bert import keys as bert_keys

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
LAYERS = 3


def randomised(model, seed=0):
  """Biases start as zeros, norms as ones; moved, a lost one would show."""
  torch.manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(torch.randn_like(parameter) * 0.1)
  return model.eval()


def adapted(base, *, name="default", **kwargs):
  """A PEFT LoRA on a copy of the base, everything that trains made random."""
  return moved(base, peft.LoraConfig(**{"r": 4, **kwargs}), name)


def moved(base, config, name="default"):
  """A PEFT model of any type on a copy of the base, what trains made random."""
  torch.manual_seed(1)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.add_(torch.randn_like(parameter) * 0.2)
  return model.eval()


def save(model, folder, **kwargs):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model.save_pretrained(folder, **kwargs)
  return folder


def load(base, folder):
  """What peft makes of a folder; a key that it didn't find or know is a warning."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about itself
    # Of peft: a tied weight has an adapter; it sets a field itself; it did not look for
    # a pattern's parameter.
    warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
    warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
    # It knows a linear layer's number of inputs and outputs, and here is a norm.
    warnings.filterwarnings("ignore", "Unsupported layer type")
    # BOFT has an extension of its own, and one factor without it.
    warnings.filterwarnings("ignore", "Failed to load the CUDA extension")
    warnings.filterwarnings("ignore", "Setting boft_n_butterfly_factor to 1")
    warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def params(model, keymap):
  """Our tree of a torch model's weights, by the key map, without our loader."""
  stored = {k: v.detach().numpy() for k, v in model.state_dict().items()}
  leaves = {}
  for key, site in tensors(keymap).items():
    leaves.setdefault(site.path, {})[site.index] = site.entry.form.to_ours(stored[key])
  tree = {}
  for path, values in leaves.items():
    node = tree
    *parents, name = path.split("/")
    for parent in parents:
      node = node.setdefault(parent, {})
    if () in values:
      node[name] = jnp.asarray(values[()])
    else:
      node[name] = jnp.asarray(np.stack([values[i] for i in sorted(values)]))
  return tree


def assert_same_leaves(got, wanted, atol=2e-6):
  got, wanted = flatten(got), flatten(wanted)
  assert got.keys() == wanted.keys()
  for path, leaf in wanted.items():
    np.testing.assert_allclose(got[path], leaf, atol=atol, rtol=1e-5, err_msg=path)


def tiny_classifier(family):
  """A tiny random BERT or RoBERTa with a sequence classifier's head."""
  torch.manual_seed(0)
  config, model = {
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
    "roberta": (
      transformers.RobertaConfig,
      transformers.RobertaForSequenceClassification,
    ),
  }[family]
  sizes = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "num_labels": 3,
    "initializer_range": 0.3,
  }
  return randomised(model(config(**sizes)))


def bert_keymap(base, scan=False):
  return bert_keys.keymap(base.config.model_type, LAYERS, scan)


def bert_logits(model):
  ids = torch.arange(2 * 7).reshape(2, 7) % 38 + 2
  mask = torch.ones_like(ids)
  mask[1, 4:] = 0
  return model(input_ids=ids, attention_mask=mask).logits


def same_tensors(got, wanted):
  """The same keys, each with the same dtype, shape and bytes."""
  got, wanted = load_file(got / WEIGHTS), load_file(wanted / WEIGHTS)
  assert got.keys() == wanted.keys()
  for key, value in wanted.items():
    assert got[key].dtype == value.dtype, key
    assert got[key].shape == value.shape, key
    assert got[key].tobytes() == value.tobytes(), key


def meaning(config):
  """A LoraConfig with each target's rank and alpha written out."""
  each = {
    path: (
      first_match(config.rank_pattern, path, config.rank),
      first_match(config.alpha_pattern, path, config.alpha),
    )
    for path in config.targets
  }
  rest = dataclasses.replace(
    config, targets=(), rank=8, alpha=8.0, rank_pattern={}, alpha_pattern={}
  )
  return each, rest


def round_trip(theirs, ours, params, keymap, **kwargs):
  """A folder of peft's, read and written; and the adapter on the way.

  The tensors must be the same, and the config mean the same.
  """
  adapter, config = hub_peft.read_adapter(theirs, params, keymap)
  before = config_file.read(theirs)
  hub_peft.write_adapter(
    ours,
    adapter,
    keymap,
    config,
    params=params,
    task_type=before.task_type,
    dtypes=hub_peft.stored_dtypes(theirs),
    **kwargs,
  )
  same_tensors(ours, theirs)
  after = config_file.read(ours)
  assert meaning(hub_peft.from_peft(ours, keymap)) == meaning(config)
  for field in (
    "bias",
    "use_rslora",
    "lora_dropout",
    "task_type",
    "init_lora_weights",
    "options",
    "peft_type",
  ):
    assert getattr(after, field) == getattr(before, field)
  return adapter


def check(base, keymap, tmp_path, forward, *, merges=True, **kwargs):
  """A folder of peft's merges here to what it merges to there, and comes back."""
  model = adapted(base, **kwargs)
  theirs = save(model, tmp_path / "theirs")
  tree = params(base, keymap)
  adapter = round_trip(theirs, tmp_path / "ours", tree, keymap)
  with torch.no_grad():
    want, untouched = forward(model), forward(base)
    assert not torch.allclose(want, untouched, atol=1e-3)
    torch.testing.assert_close(forward(load(base, tmp_path / "ours")), want)
  if merges:
    merged = params(model.merge_and_unload(), keymap)
    assert_same_leaves(lx.merge(tree, adapter), merged)
  return adapter


def toy(keymap, params, config, noise=0.1):
  """An adapter as `init` would start it, moved off zero; no model needed."""
  rng = np.random.default_rng(0)
  leaves = flatten(params)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * noise, jnp.float32)
  adapter = {}
  for path, leaf in leaves.items():
    if re.fullmatch(config.targets, path):
      *stack, fan_in, fan_out = leaf.shape
      rank = next((r for p, r in config.rank_pattern.items() if p in path), config.rank)
      roles = (*["stack"] * len(stack), "in", "out")
      a, b = draw(*stack, fan_in, rank), draw(*stack, rank, fan_out)
      adapter[path] = lx.LoRA(a, b, jnp.float32(config.alpha / rank), roles)
    elif path.split("/")[0] in config.tuned:
      adapter[path] = lx.Tuned(leaf + draw(*leaf.shape), leaf)
  return adapter


def pairs(one, other, paths):
  """Both trees' leaves at these paths."""
  one, other = flatten(one), flatten(other)
  return [(one[path], other[path]) for path in paths]

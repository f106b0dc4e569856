"""What must hold of every family: checks against a model of transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

import lorax_flax as lx
from lorax_flax.hub.checkpoints import export
from lorax_flax.hub.checkpoints import keymap as km
from lorax_flax.models import registry
from lorax_flax.sharding import mesh
from tests.adapt import checks

TOLERANCE = 1e-4


def save(folder, model, *, seed=0):
  """Saves a random model; norms and biases too are such that a lost one would show."""
  torch.manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.add_(0.1 * torch.randn_like(parameter))
  model.eval().save_pretrained(folder)
  return model


def change_config(folder, **fields):
  """Fields of config.json, set; those set to ... are taken out."""
  path = folder / "config.json"
  config = json.loads(path.read_text()) | fields
  config = {name: value for name, value in config.items() if value is not ...}
  path.write_text(json.dumps(config))


def tokens(length, rows, vocab):
  """Rows (ids, mask): whole, and padded on the right, on the left, on both sides."""
  rng = np.random.default_rng(length)
  mask = np.ones((rows, length), np.int32)
  if rows > 1:
    mask[1, length - 3 :] = mask[2, :2] = mask[3, [0, -1]] = 0
  ids = rng.integers(2, vocab, (rows, length)).astype(np.int32)
  return ids * mask, mask


def tensors(inputs):
  """Arrays for torch, whose ids are 64 bits wide."""
  found = {name: torch.tensor(np.asarray(x)) for name, x in inputs.items()}
  return {n: x if x.is_floating_point() else x.long() for n, x in found.items()}


def torch_logits(model, inputs):
  with torch.no_grad():
    return model(**tensors(inputs)).logits.numpy()


def logits(loaded, inputs):
  apply = jax.jit(
    lambda params, inputs: loaded.module.apply({"params": params}, **inputs)
  )
  return np.asarray(apply(loaded.params, inputs))


def check_logits(
  folder, model, batches, *, real=lambda inputs: ..., peer=torch_logits, **options
):
  """Logits equal the peer's, of each batch; `real` picks those that mean something.

  Returns:
    The loaded model.
  """
  loaded = registry.load(folder, **options)
  assert not loaded.new_paths
  sizes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
  assert sizes(loaded.params) == sizes(loaded.family.shapes(loaded.module))
  for inputs in batches:
    got, want = logits(loaded, inputs), peer(model, inputs)
    assert got.dtype == np.float32
    assert got.shape == want.shape
    picked = real(inputs)
    np.testing.assert_allclose(got[picked], want[picked], atol=TOLERANCE)
    assert np.abs(want).max() > 0.1  # or the tolerance would mean nothing
  return loaded


def check_full_keys(loaded, model):
  """The key map names what is in the peer's state dict, ties included."""
  keymap = loaded.keymap
  full = [km.full_key(keymap, bare) for bare in keymap.sites]
  assert sorted([*full, *keymap.ties]) == sorted(model.state_dict())


def check_modules(loaded, model):
  """The key map's modules and kinds are the peer's."""
  kinds = {
    torch.nn.Linear: "linear",
    torch.nn.Embedding: "embedding",
    torch.nn.LayerNorm: "norm",
    torch.nn.Conv1d: "conv",
    torch.nn.Conv2d: "conv",
    Conv1D: "linear",
    T5LayerNorm: "norm",
  }
  found = km.modules(loaded.keymap)
  for name, module in model.named_modules():
    if type(module) in kinds and f"{name}.weight" not in loaded.keymap.ties:
      assert found.pop(name) == kinds[type(module)], name
  return found


def check_axes(loaded):
  """Every axis of every weight has a name that a rule of the mesh covers."""
  axes = mesh.names_by_path(loaded.family.logical_axes(loaded.module))
  one = mesh.make(mesh.MeshConfig(), jax.devices()[:1])
  mesh.of_params(one, axes, loaded.params)


def check_round_trip(folder, out, model, **options):
  """What we write is the peer again, bit for bit."""
  loaded = registry.load(folder, **options)
  labels = None
  if loaded.family.has_labels:
    labels = [f"label {i}" for i in range(loaded.config.num_labels)]
  export.write_checkpoint(
    out,
    loaded.params,
    loaded.keymap,
    loaded.hf_config,
    architecture=loaded.family.architecture,
    labels=labels,
    base=folder,
    overwrite=False,
  )
  again, report = type(model).from_pretrained(out, output_loading_info=True)
  assert not any(report.values()), report
  want, got = model.state_dict(), again.state_dict()
  assert want.keys() == got.keys()
  assert all(torch.equal(want[key], got[key]) for key in want)
  assert again.config.architectures == [loaded.family.architecture]


def check_gradients(folder, model, inputs, *, real=lambda inputs: ..., **options):
  """Gradients of every weight equal torch's."""
  loaded = registry.load(folder, **options)
  picked = real(inputs)

  def loss(params):
    found = loaded.module.apply({"params": params}, **inputs)
    return jnp.sum(jnp.sin(found[picked]))

  grads = jax.jit(jax.grad(loss))(loaded.params)
  torch.sin(model(**tensors(inputs)).logits[picked]).sum().backward()
  keymap, stored = loaded.keymap, export.to_tensors(grads, loaded.keymap)
  got = {
    km.full_key(keymap, bare): stored[km.file_key(keymap, bare)].copy()
    for bare in keymap.sites
  }
  want = {
    name: p.grad.numpy().copy()
    for name, p in model.named_parameters()
    if p.grad is not None
  }
  # torch forms no gradient of a padding's row.
  for name, module in model.named_modules():
    row = getattr(module, "padding_idx", None)
    if isinstance(module, torch.nn.Embedding) and row is not None:
      got[f"{name}.weight"][row] = want[f"{name}.weight"][row] = 0
  assert got.keys() == want.keys()
  for name in want:
    scale = max(1.0, np.abs(want[name]).max())
    np.testing.assert_allclose(
      got[name] / scale, want[name] / scale, atol=TOLERANCE, err_msg=name
    )


def check_lora(loaded, inputs, targets, /, **config):
  """A LoRA on these paths, and no others: a no-op at first, and equal to merged."""

  def apply_fn(params, inputs):
    return loaded.module.apply({"params": params}, **inputs)

  lora = lx.adapt(apply_fn, lx.LoraConfig(rank=2, alpha=3, **config))
  inputs = jax.tree.map(jnp.asarray, inputs)
  adapter = lora.init(jax.random.key(1), loaded.params, inputs)
  assert set(adapter) == set(targets)
  apply = jax.jit(lora.apply)
  start = apply(loaded.params, adapter, inputs)
  np.testing.assert_array_equal(start, jax.jit(apply_fn)(loaded.params, inputs))
  moved = checks.perturbed(adapter)
  checks.check_equals_merged(lora, apply_fn, loaded.params, moved, inputs)
  assert not np.allclose(apply(loaded.params, moved, inputs), start, atol=1e-3)

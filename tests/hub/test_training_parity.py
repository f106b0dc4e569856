"""Three steps of AdamW on PEFT's adapters, in torch and here, from the same start."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import lorax_flax as lx
from lorax_flax.hub import peft as hub_peft
from lorax_flax.models import registry
from tests.hub import peft_peers as peers
from tests.models import decoders, family, test_gpt2, test_t5, test_vit
from tests.models import peers as encoders

STEPS, RATE, DECAY, EPS = 3, 3e-3, 0.05, 1e-6


def _roberta(folder):
  return encoders.save(folder, "roberta", num_labels=3)


def _llama(folder):
  return decoders.Peer("Llama").save(folder, tie_word_embeddings=True)


def _mixtral(folder):
  fields = {"num_local_experts": 4, "num_experts_per_tok": 2}
  return decoders.Peer("Mixtral").save(folder, **fields)


TEXT = decoders.batch(13, 9, -7)

# The base, its inputs, PEFT's config, and whether layers are scanned here.
CASES = {
  "roberta": (
    _roberta,
    encoders.batch("roberta"),
    {"task_type": "SEQ_CLS", "target_modules": "all-linear"},
    True,
  ),
  "gpt2": (
    test_gpt2.save,
    test_gpt2.batch(),
    {
      "target_modules": ["c_attn", "c_fc"],
      "trainable_token_indices": [4, 9, 11],
      "layers_to_transform": [0, 2],
      "layers_pattern": "h",
    },
    True,
  ),
  "llama": (
    _llama,
    TEXT,
    {
      "target_modules": "all-linear",
      "use_rslora": True,
      "alpha_pattern": {"o_proj": 3},
    },
    False,
  ),
  "llama, dora": (_llama, TEXT, {"use_dora": True}, True),
  "t5": (
    test_t5.save,
    test_t5.batch(),
    {"target_modules": ["q", "v", "wo"]},
    False,
  ),
  "vit": (
    test_vit.save,
    test_vit.batch(),
    {
      "target_modules": ["projection", "v_proj"],
      "modules_to_save": ["classifier"],
      "bias": "lora_only",
      "lora_bias": True,
    },
    False,
  ),
  "mixtral": (
    _mixtral,
    TEXT,
    {"target_modules": ["o_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
    False,
  ),
}


def _batches(inputs):
  """The rows in another order each time, the mask of their logits, and a generator."""
  for seed in range(STEPS):
    turned = {name: np.roll(x, seed, axis=0) for name, x in inputs.items()}
    mask = turned.get("decoder_attention_mask", turned.get("attention_mask"))
    yield turned, mask, np.random.default_rng(seed)


def _rows(logits, mask, rng):
  """The weight of each row of logits, and its label."""
  *rows, labels = logits.shape
  weights = np.ones(rows) if len(rows) == 1 else np.asarray(mask)
  return weights.astype(np.float32), rng.integers(0, labels, rows).astype(np.int32)


def _train_torch(model, inputs):
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=RATE, eps=EPS, weight_decay=DECAY)
  losses = []
  for batch, mask, rng in _batches(inputs):
    logits = model(**family.tensors(batch)).logits
    weights, labels = _rows(logits, mask, rng)
    each = torch.nn.functional.cross_entropy(
      logits.flatten(0, -2), torch.tensor(labels).long().flatten(), reduction="none"
    )
    loss = (each * torch.tensor(weights).flatten()).sum() / float(weights.sum())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
  return losses


def _train_ours(loaded, adapter, config, inputs):
  def apply_fn(params, inputs):
    return loaded.module.apply({"params": params}, **inputs)

  lora = lx.adapt(apply_fn, config)
  trained, rest = lx.partition(adapter, lx.trainable_mask(adapter))
  optimizer = optax.adamw(RATE, eps=EPS, weight_decay=DECAY)
  state = optimizer.init(trained)

  @jax.jit
  def step(trained, state, inputs, weights, labels):
    def loss_of(trained):
      logits = lora.apply(loaded.params, lx.combine(trained, rest), inputs)
      each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return jnp.sum(each * weights) / jnp.sum(weights)

    loss, grads = jax.value_and_grad(loss_of)(trained)
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(grads, state, trained)
    return optax.apply_updates(trained, updates), state, loss

  losses = []
  for batch, mask, rng in _batches(inputs):
    shape = jax.eval_shape(apply_fn, loaded.params, batch)
    weights, labels = _rows(shape, mask, rng)
    trained, state, loss = step(trained, state, batch, weights, labels)
    losses.append(float(loss))
  return losses, lx.combine(trained, rest)


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_pefts(case, tmp_path):
  save, inputs, config, scan = CASES[case]
  base = save(tmp_path / "base")
  # B random too: a zero B hides A's gradient.
  model = peers.adapted(base, init_lora_weights=False, **config)
  peers.save(model, tmp_path / "start")
  theirs = _train_torch(model, inputs)
  peers.save(model, tmp_path / "end")

  loaded = registry.load(tmp_path / "base", scan=scan)
  read = lambda name: hub_peft.read_adapter(
    tmp_path / name, loaded.params, loaded.keymap
  )
  (start, lora_config), (wanted, _) = read("start"), read("end")
  ours, adapter = _train_ours(loaded, start, lora_config, inputs)
  np.testing.assert_allclose(ours, theirs, rtol=1e-3)
  assert adapter.keys() == wanted.keys()
  for path, delta in wanted.items():
    for name in delta.trained:
      ends = [getattr(tree[path], name) for tree in (adapter, wanted, start)]
      moved = jnp.linalg.norm(ends[1] - ends[2])
      apart = jnp.linalg.norm(ends[0] - ends[1])
      assert moved > 0, (path, name)
      # Relative to the way it went, not to where it is.
      assert apart < 1e-3 * moved, (path, name, apart / moved)

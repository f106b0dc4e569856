"""Training steps against PEFT and torch, from the same start on the same batches."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import lorax_flax as lx
from lorax_flax.hub.peft import folder as hub_peft
from lorax_flax.methods import LoRA
from lorax_flax.models import registry
from lorax_flax.train import losses, optim, step
from lorax_flax.train import state as states
from tests.models import peers

LABELS, STEPS, ROWS = 3, 4, 8
RATE, WARMUP, DECAY, CLIP, SMOOTHING = 2e-3, 1, 0.05, 0.7, 0.1


def _batches(family):
  """Padded batches, with labels, as numpy."""
  rng = np.random.default_rng(5)
  for number in range(STEPS):
    inputs = peers.batch(family, seed=number, rows=ROWS)
    batch = {name: np.asarray(x, np.int32) for name, x in inputs.items()}
    yield batch | {"labels": rng.integers(0, LABELS, ROWS).astype(np.int32)}


def _train_peft(model, family):
  """transformers' Trainer, written out: AdamW, decay mask, clipping, schedule."""
  decays = transformers.Trainer.get_decay_parameter_names(None, model)
  named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(
    [
      {"params": [p for n, p in named if n in decays], "weight_decay": DECAY},
      {"params": [p for n, p in named if n not in decays], "weight_decay": 0.0},
    ],
    lr=RATE,
    eps=1e-6,
  )
  schedule = transformers.get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
  found, norms = [], []
  model.eval()  # No dropout.
  for batch in _batches(family):
    tensors = {n: torch.tensor(x, dtype=torch.long) for n, x in batch.items()}
    labels = tensors.pop("labels")
    loss = torch.nn.functional.cross_entropy(
      model(**tensors).logits, labels, label_smoothing=SMOOTHING
    )
    optimizer.zero_grad()
    loss.backward()
    norms.append(float(torch.nn.utils.clip_grad_norm_([p for _, p in named], CLIP)))
    optimizer.step()
    schedule.step()
    found.append(loss.item())
  return found, norms


def _train_ours(folder, adapter_folder, family, accumulation):
  loaded = registry.load(folder, num_labels=LABELS)
  adapter, config = hub_peft.read_adapter(adapter_folder, loaded.params, loaded.keymap)
  apply_fn = lambda params, batch: loaded.module.apply({"params": params}, **batch)
  lora = lx.adapt(apply_fn, config)
  rate = optim.schedule("linear", RATE, STEPS, WARMUP)
  optimizer = optim.optimizer(
    rate, b1=0.9, b2=0.999, eps=1e-6, weight_decay=DECAY, grad_clip=CLIP
  )
  state, base = states.create(loaded.params, adapter, optimizer, jax.random.key(0))
  train = step.jitted(
    step.train_step(
      lambda params, adapter, batch, key: lora.apply(
        params, adapter, {name: batch[name] for name in inputs}
      ),
      losses.cross_entropy(SMOOTHING),
      optimizer,
      rate,
      accumulation,
    )
  )
  inputs = peers.batch(family, seed=0, rows=ROWS)
  found, norms = [], []
  for batch in _batches(family):
    weights = {"weights": np.ones(ROWS, np.float32)}
    state, metrics = train(state, base, batch | weights)
    found.append(metrics["loss"].value())
    norms.append(metrics["grad_norm"].value())
  return found, norms, base.full(state.trained)[1], loaded


# PEFT asks transformers by a name that is on its way out.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
  ("family", "targets", "accumulation"),
  [("bert", "all-linear", 1), ("roberta", ["query", "value"], 4)],
)
def test_steps_equal_peft_and_torch(tmp_path, family, targets, accumulation):
  peers.save(tmp_path / "base", family, num_labels=LABELS)
  base = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / "base"
  )
  torch.manual_seed(1)
  model = peft.get_peft_model(
    base,
    peft.LoraConfig(
      task_type="SEQ_CLS",
      target_modules=targets,
      r=4,
      lora_alpha=16,
      init_lora_weights=False,  # B random too: a zero B hides A's gradient.
    ),
  )
  model.save_pretrained(tmp_path / "start")
  theirs, their_norms = _train_peft(model, family)
  model.save_pretrained(tmp_path / "end")

  ours, our_norms, adapter, loaded = _train_ours(
    tmp_path / "base", tmp_path / "start", family, accumulation
  )
  np.testing.assert_allclose(ours, theirs, rtol=1e-4)
  np.testing.assert_allclose(our_norms, their_norms, rtol=1e-3)
  assert max(their_norms) > CLIP > min(their_norms) or min(their_norms) > CLIP
  wanted, _ = hub_peft.read_adapter(tmp_path / "end", loaded.params, loaded.keymap)
  start, _ = hub_peft.read_adapter(tmp_path / "start", loaded.params, loaded.keymap)
  assert adapter.keys() == wanted.keys()
  for path, delta in wanted.items():
    names = ("a", "b") if isinstance(delta, LoRA) else ("value",)
    for name in names:
      ends = [getattr(tree[path], name) for tree in (adapter, wanted, start)]
      moved = jnp.linalg.norm(ends[1] - ends[2])
      apart = jnp.linalg.norm(ends[0] - ends[1])
      assert moved > 0
      # Relative to the way it went, not to where it is.
      assert apart < 1e-3 * moved, (path, name)
      np.testing.assert_allclose(ends[0], ends[1], rtol=1e-4, atol=1e-6)

"""The largest errors against transformers and PEFT, of every family, on random weights.

  python -m benchmarks.parity [--fields] [FAMILY …]

Tiny models of transformers with odd sizes, padded batches where there is text. Columns:

  logits    ours and transformers', float32, the larger of layers looped and scanned
  trip      tensors that change when they are read and written (0 of N)
  in        logits under a random adapter that PEFT wrote and we read
  out       logits of PEFT under the adapter that we read and wrote again
  loss      three AdamW steps from the same start, ours and torch's: losses, relative
  adapter   and the adapters at the end, relative to their change

With --fields instead: the fields of PEFT's LoraConfig (peft_matrix.py). A cell is the
largest error of logits over the largest logit, read here, and written again and read
by PEFT; or "refused", with the reasons below; or "–" where PEFT has no such adapter.
"""

import argparse
import contextlib
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax_flax as lx
from benchmarks import common, peft_matrix
from benchmarks.peers import PEERS, Peer
from lorax_flax.hub.checkpoints import export
from lorax_flax.hub.peft import folder as hub_peft
from lorax_flax.models import registry

STEPS, RATE = 3, 1e-3
HEADER = ("family", "logits", "trip", "in", "out", "loss", "adapter")

Inputs = Mapping[str, np.ndarray]


def measure(peer: Peer, folder: Path) -> dict[str, Any]:
  """Every check of one family, by the names of `HEADER`.

  Args:
    folder: for the files that the two sides exchange.
  """
  import peft
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  model = peer.save(folder / "base")
  inputs = peer.inputs()
  real = peer.real(inputs)
  loaded = {scan: registry.load(folder / "base", scan=scan) for scan in (False, True)}
  want = _torch(model, inputs)[real]
  found: dict[str, Any] = {
    "logits": max(
      _difference(_logits(x, x.params, inputs)[real], want) for x in loaded.values()
    ),
    "trip": _round_trip(loaded[True], folder, model),
  }

  torch.manual_seed(1)
  # B random too: where it is zero, A has no gradient.
  config = peft.LoraConfig(
    r=3, lora_alpha=7, init_lora_weights=False, task_type=peer.task_type, **peer.lora
  )
  adapted = peft.get_peft_model(model, config).eval()
  adapted.save_pretrained(folder / "start")
  want = _torch(adapted, inputs)[real]
  read = {
    scan: hub_peft.read_adapter(folder / "start", x.params, x.keymap)
    for scan, x in loaded.items()
  }
  found["in"] = max(
    _difference(_adapted(x, read[scan][1])(x.params, read[scan][0], inputs)[real], want)
    for scan, x in loaded.items()
  )
  hub_peft.write_adapter(
    folder / "ours",
    read[True][0],
    loaded[True].keymap,
    read[True][1],
    task_type=peer.task_type,
  )
  again = peft.PeftModel.from_pretrained(peer.load(folder / "base"), folder / "ours")
  found["out"] = _difference(_torch(again.eval(), inputs)[real], want)
  return found | training(peer, adapted, loaded[False], *read[False], folder)


def training(
  peer: Peer, model, loaded, adapter, config, folder: Path
) -> dict[str, float]:
  """Three steps of AdamW on both sides, without dropout."""
  import torch

  batches = [peer.inputs(seed=seed) for seed in range(1, STEPS + 1)]
  labels = [peer.labels(inputs) for inputs in batches]
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
  theirs = []
  for inputs, labels_N in zip(batches, labels, strict=True):
    logits = model(**peer.tensors(inputs)).logits[peer.real(inputs)]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels_N).long())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    theirs.append(loss.item())
  model.save_pretrained(folder / "end")
  end, _ = hub_peft.read_adapter(folder / "end", loaded.params, loaded.keymap)

  apply = _adapted(loaded, config)
  moving, rest = lx.partition(adapter, lx.trainable_mask(adapter))
  tx = optax.adamw(RATE, weight_decay=0.01)

  @jax.jit
  def step(moving, state, inputs, picked, labels_N):
    def loss(moving):
      logits = apply(loaded.params, lx.combine(moving, rest), inputs)
      rows = logits.reshape(-1, logits.shape[-1])[picked]
      return optax.softmax_cross_entropy_with_integer_labels(rows, labels_N).mean()

    value, grads = jax.value_and_grad(loss)(moving)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes types
      updates, state = tx.update(grads, state, moving)
    return optax.apply_updates(moving, updates), state, value

  state, ours, start = tx.init(moving), [], moving
  for inputs, labels_N in zip(batches, labels, strict=True):
    picked = np.flatnonzero(peer.real(inputs))
    moving, state, value = step(moving, state, inputs, picked, labels_N)
    ours.append(float(value))
  want, _ = lx.partition(end, lx.trainable_mask(end))
  leaves = zip(*map(jax.tree.leaves, (moving, want, start)), strict=True)
  return {
    "loss": max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)),
    "adapter": max(
      float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b - c)) for a, b, c in leaves
    ),
  }


def _torch(model, inputs: Inputs) -> np.ndarray:
  import torch

  with torch.no_grad():
    return model(**Peer.tensors(inputs)).logits.numpy()


def _logits(loaded: registry.Loaded, params: Any, inputs: Inputs) -> np.ndarray:
  apply = jax.jit(lambda p, inputs: loaded.module.apply({"params": p}, **inputs))
  return np.asarray(apply(params, inputs))


def _adapted(
  loaded: registry.Loaded, config: lx.LoraConfig
) -> Callable[..., jax.Array]:
  """(params, adapter, inputs) -> logits."""
  apply_fn = lambda params, inputs: loaded.module.apply({"params": params}, **inputs)
  return jax.jit(lx.adapt(apply_fn, config).apply)


def _difference(got: Any, want: Any) -> float:
  return float(np.abs(np.asarray(got) - want).max())


def _round_trip(loaded: registry.Loaded, folder: Path, model) -> str:
  """Number of tensors that differ after we write them and transformers reads them."""
  import torch

  labels = None
  if loaded.family.has_labels:
    labels = [f"label {i}" for i in range(loaded.config.num_labels)]
  export.write_checkpoint(
    folder / "written",
    loaded.params,
    loaded.keymap,
    loaded.hf_config,
    architecture=loaded.family.architecture,
    labels=labels,
    base=folder,
    overwrite=False,
  )
  want = model.state_dict()
  got = type(model).from_pretrained(folder / "written").state_dict()
  differ = sum(not torch.equal(want[key], got[key]) for key in want)
  return f"{differ} of {len(want)}"


def matrix(families: Sequence[str]) -> str:
  """The table of PEFT's fields and families, and the reasons of the refusals."""
  cells: dict[str, dict[str, peft_matrix.Cell]] = {}
  for name in families:
    peer = PEERS[name]
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
      warnings.simplefilter("ignore")
      peer.save(Path(scratch) / "base")
      for title, case in peft_matrix.CASES.items():
        folder = Path(tempfile.mkdtemp(dir=scratch))
        base = Path(scratch) / "base"
        cell = peft_matrix.measure(peer, case, base, folder)
        cells.setdefault(title, {})[name] = cell
    print(f"{name}: done", flush=True)
  rows = [(title, *(row[n].text for n in families)) for title, row in cells.items()]
  text = common.table("PEFT's fields, logits", ("field", *families), rows)
  reasons: dict[str, list[str]] = {}
  for title, row in cells.items():
    for name, cell in row.items():
      if cell.reason is not None:
        reasons.setdefault(cell.reason, []).append(f"{title} ({name})")
  listed = [f"{'; '.join(where)}: {why}" for why, where in reasons.items()]
  wrong = sum(cell.is_wrong for row in cells.values() for cell in row.values())
  return "\n".join((text, *listed, f"silently wrong: {wrong}", common.repeat()))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("families", nargs="*", default=[*PEERS], metavar="FAMILY")
  parser.add_argument("--fields", action="store_true", help="the fields of LoraConfig")
  args = parser.parse_args()
  if unknown := set(args.families) - set(PEERS):
    parser.error(f"no family {sorted(unknown)[0]!r}; there are {', '.join(PEERS)}")
  if args.fields:
    print(matrix(args.families))
    return
  rows = []
  for name in args.families:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
      stack.enter_context(warnings.catch_warnings())
      warnings.simplefilter("ignore")
      found = measure(PEERS[name], Path(folder))
    cells = (found[column] for column in HEADER[1:])
    rows.append((name, *(c if isinstance(c, str) else f"{c:.0e}" for c in cells)))
    print(f"{name}: done", flush=True)
  print(common.table("Largest errors, float32", HEADER, rows))
  print(common.repeat())


if __name__ == "__main__":
  main()

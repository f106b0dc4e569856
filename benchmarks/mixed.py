"""Rows with adapters of their own in one batch, against merged and against PEFT.

  python -m benchmarks.mixed
  python -m benchmarks.mixed --adapters=1,8 --rows=8 --peft=8 --layers=4

SmolLM2's shape with random weights, and LoRA adapters that PEFT writes and both sides
read. A batch of rows is prefilled, then decoded greedily; row i has adapter i modulo
their number. The merged model has one adapter for all rows. PEFT mixes by
`adapter_names=`. The sides take turns in one process, ratios are taken round by round,
against merged. The last line is the time that a swap adds: one adapter, from the host
into a slot of the largest number.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers

import lorax_flax as lx
from benchmarks import common
from lorax_flax.adapt.many import Many
from lorax_flax.hub.adapters import any as adapters
from lorax_flax.models import registry
from lorax_flax.serve import decoder

# Number of new tokens -> the new ids of each row.
Write = Callable[[int], np.ndarray]


def _name(number: int) -> str:
  """The adapter's name in PEFT, which takes a bare number for a layer's."""
  return f"tenant{number}"


def _theirs(folder: Path, shape: common.Shape, count: int, args: Any) -> Any:
  """PEFT's model with an adapter of each number; each is written into its folder."""
  torch.manual_seed(0)
  ends = {"eos_token_id": None, "bos_token_id": None}
  config = transformers.LlamaConfig(**common.decoder_config(shape), **ends)
  model = transformers.LlamaForCausalLM(config)
  model.generation_config = transformers.GenerationConfig()
  model.save_pretrained(folder / "base")
  targets = args.targets if args.targets == "all-linear" else args.targets.split(",")
  of_lora = peft.LoraConfig(r=args.rank, lora_alpha=32, target_modules=targets)
  adapted: Any = peft.get_peft_model(model, of_lora, adapter_name=_name(0)).eval()
  for i in range(1, count):
    adapted.add_adapter(_name(i), of_lora)
  with torch.no_grad():
    for name, parameter in adapted.named_parameters():
      if "lora_B" in name:
        parameter.normal_(std=0.02)
  for i in range(count):
    adapted.save_pretrained(folder / "adapters", selected_adapters=[_name(i)])
  return adapted


def _write_theirs(model: Any, ids_BxT: np.ndarray, count: int) -> Write:
  ids, names = torch.tensor(ids_BxT), [_name(i % count) for i in range(len(ids_BxT))]

  def write(new: int) -> np.ndarray:
    with torch.inference_mode():
      found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=0,
        adapter_names=names,
      )
    return found[:, ids.shape[1] :].numpy()

  return write


def _write_ours(model: Any, made: Any, params: Any, ids_BxT: np.ndarray) -> Write:
  inputs = {"input_ids": ids_BxT, "attention_mask": np.ones_like(ids_BxT)}

  def write(new: int) -> np.ndarray:
    cache = model.blank_cache(*np.add(ids_BxT.shape, (0, new)))
    logits, cache = made.prefill(params, inputs, cache)
    found = [jnp.argmax(logits, axis=-1)]
    for _ in range(new - 1):
      logits, cache = made.step(params, found[-1], cache)
      found.append(jnp.argmax(logits, axis=-1))
    return np.stack(found, axis=1)

  return write


def _many(model: Any, rank: int, count: int) -> Many:
  lora = lx.adapt(decoder.forward_of(model), lx.LoraConfig())
  return lx.many(lora, capacity=count, max_rank=rank)


def _sides(folder: Path, shape: common.Shape, args: Any) -> dict[str, Write]:
  most = max(args.adapters)
  model = _theirs(folder, shape, most, args)
  loaded = registry.load(folder / "base")
  inside = [folder / "adapters" / _name(i) for i in range(most)]
  read = [adapters.read(each, loaded.params, loaded.keymap).adapter for each in inside]
  rng = np.random.default_rng(0)
  ids_BxT = rng.integers(3, shape.vocab, (args.rows, args.prompt)).astype(np.int32)
  merged = lx.merge(loaded.params, read[0])
  plain, mixed = decoder.decoder_of(loaded), decoder.many(loaded)
  sides = {"merged, 1 for all": _write_ours(loaded, plain, merged, ids_BxT)}
  for count in args.adapters:
    many = _many(loaded, args.rank, count)
    slots = many.empty(loaded.params, read[0])
    for i in range(count):
      slots = many.put(loaded.params, slots, i, read[i])
    params = loaded.params, slots, np.arange(args.rows, dtype=np.int32) % count
    made = decoder.decoder_of(loaded, mixed)
    sides[f"mixed, {count}"] = _write_ours(loaded, made, params, ids_BxT)
    if count in args.peft:
      sides[f"PEFT, mixed, {count}"] = _write_theirs(model, ids_BxT, count)
  swaps = _swaps(many, loaded.params, slots, read)
  print(f"a swap takes {1e3 * statistics.median(swaps):.1f} ms")
  return sides


def _swaps(many: Many, params: Any, slots: Any, read: list[Any]) -> list[float]:
  """Seconds of each of some swaps, after the first."""
  # The slots are given away, and the sides measure theirs.
  slots, found = jax.tree.map(jnp.copy, slots), []
  on_host = [jax.tree.map(np.asarray, each) for each in read[:2]]
  for i in range(8):
    start = time.perf_counter()
    slots = many.put(params, slots, 0, on_host[i % len(on_host)])
    jax.block_until_ready(slots)
    found.append(time.perf_counter() - start)
  return found[1:]


def _seconds(write: Write, new: int) -> float:
  start = time.perf_counter()
  write(new)
  return time.perf_counter() - start


def _phases(turns: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
  """Seconds of the prefill, and of the steps after it, of each turn."""
  return [first for first, _ in turns], [full - first for first, full in turns]


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",") if number]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--adapters", type=_numbers, default=[1, 8, 64, 256], help="in one batch")
  add("--peft", type=_numbers, default=[1, 8, 64], help="of these, with PEFT too")
  add("--rows", type=int, default=64, help="of the batch")
  add("--prompt", type=int, default=32, help="tokens of each row")
  add("--new", type=int, default=16, help="tokens after each prompt")
  add("--rank", type=int, default=16)
  add("--targets", default="q_proj,v_proj", help="names, or all-linear")
  add("--layers", type=int, default=common.SMOLLM2.layers)
  add("--rounds", type=int, default=3)
  args = parser.parse_args()
  shape = dataclasses.replace(common.SMOLLM2, layers=args.layers)
  with tempfile.TemporaryDirectory() as folder:
    sides = _sides(Path(folder), shape, args)
    tokens = {name: write(args.new) for name, write in sides.items()}
    for write in sides.values():
      write(1)
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(args.rounds):
      for name, write in sides.items():
        turns[name].append((_seconds(write, 1), _seconds(write, args.new)))
  merged, rows = next(iter(sides)), []
  for name, found in turns.items():
    prefill, decode = _phases(found)
    ratios = [
      statistics.median(np.divide(of_merged, own))
      for of_merged, own in zip(_phases(turns[merged]), (prefill, decode), strict=True)
    ]
    peer = name.replace("mixed", "PEFT, mixed", 1)
    same = tokens.get(peer) if peer != name else None
    rows.append(
      (
        name,
        f"{args.rows * args.prompt / statistics.median(prefill):.0f}",
        f"{ratios[0]:.2f}",
        f"{args.rows * (args.new - 1) / statistics.median(decode):.1f}",
        f"{ratios[1]:.2f}",
        "" if same is None else f"{np.mean(same == tokens[name]):.0%}",
      )
    )
  header = (
    "side",
    "prompt tokens/s",
    "ratio",
    "new tokens/s",
    "ratio",
    "same as PEFT",
  )
  title = f"{shape}\n{args.rows} rows, {args.prompt} + {args.new} tokens, float32"
  print(common.table(title, header, rows))
  print(common.repeat())


if __name__ == "__main__":
  main()

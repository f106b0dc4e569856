"""Reads an adapter of any form and writes it in another.

  python -m experiments.convert --base=B --from=A --to=DIR \
    [--format=peft|loralib|vllm|orbax|gemma|gguf|mlx|torchtune|tunix]

A is a PEFT folder, a folder that this command wrote, a GGUF file, a folder of mlx-lm, a
checkpoint of the gemma library, torchtune's adapter_model.pt or a folder of Tunix's
trainer (these do not hold --alpha), or a state dict of loralib (.bin, .pt,
.safetensors; it does not hold --alpha, nor --enable_lora where layers are merged). Its
form is found.
The adapter read is printed, and written to DIR atomically. Our own form, orbax, keeps
all that PEFT's says: the way back gives the same tensors.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments.cli import command as cli
from experiments.cli import model_flags
from lorax_flax import text_table
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.files import atomic
from lorax_flax.hub.adapters import any as adapters
from lorax_flax.hub.adapters import fused, loralib, plain, vllm
from lorax_flax.hub.adapters import native as orbax_adapter
from lorax_flax.hub.adapters.native import Saved
from lorax_flax.hub.checkpoints.keymap import KeyMap, path_to_modules
from lorax_flax.hub.peft import folder as peft
from lorax_flax.methods import Delta, KernelDelta, Tuned
from lorax_flax.models import gguf, registry, with_adapter

FORMATS = ("orbax", "peft", "loralib", "vllm", *adapters.PLAIN)

FLAGS = flags.FlagValues()
BASE = model_flags.base(FLAGS)
QUANT = model_flags.quant(FLAGS)
OTHER_BASE = model_flags.other_base(FLAGS)
FROM = model_flags.adapter(FLAGS, "from", note="Or a loralib file.")
TO = model_flags.out(FLAGS, "to")
FORMAT = flags.DEFINE_string(
  "format", "orbax", f"What to write: {', '.join(FORMATS)}.", flag_values=FLAGS
)
ALPHA = flags.DEFINE_float(
  "alpha",
  None,
  "lora_alpha of loralib's, torchtune's or Tunix's files.",
  flag_values=FLAGS,
)
ENABLE_LORA = flags.DEFINE_list(
  "enable_lora",
  None,
  "The parts of loralib's MergedLinear that have factors: true,false,true.",
  flag_values=FLAGS,
)
MAX_RANK = flags.DEFINE_integer(
  "max_rank",
  None,
  "vLLM's --max-lora-rank, which the adapter must keep to (default: 16, as vLLM's).",
  lower_bound=1,
  flag_values=FLAGS,
)
OVERWRITE = model_flags.overwrite(FLAGS, "an adapter in --to that was written here")


def convert(
  base: str,
  source: str,
  to: str,
  form: str = "orbax",
  *,
  alpha: float | None = None,
  enable_lora: Sequence[bool] | None = None,
  max_rank: int | None = None,
  overwrite: bool = False,
  quant: str | None = None,
  other_base: bool = False,
) -> tuple[Saved, KeyMap, list[str]]:
  """Converts; see the flags.

  Returns:
    The adapter read, the base's key map, and lines for the user.
  """
  folder, file = Path(to).expanduser(), Path(source).expanduser()
  if form not in FORMATS:
    raise LoraxError(unknown("--format", form, FORMATS))
  if max_rank is not None and form != "vllm":
    raise LoraxError("--max_rank is vLLM's: it goes with --format=vllm")
  atomic.refuse_inputs(folder, (Path(base).expanduser(), file))
  atomic.refuse_unless_free(folder, overwrite=overwrite)
  is_loralib = adapters.form(file) == "loralib"
  loaded, saved = with_adapter.load(
    base,
    file,
    alpha=alpha,
    # For reading where the source is loralib's, else for writing.
    enable_lora=enable_lora if is_loralib or form != "loralib" else None,
    quant=quant,
    other_base=other_base,
  )
  if is_loralib:
    saved = dataclasses.replace(saved, base_name=base)
  notes = []
  parts, theirs = fused.parts_of(saved.adapter), fused.widened(saved)
  if parts is not None and form not in ("orbax", "loralib"):
    notes.append(
      "the parts of each fused kernel are one LoRA there, with zeros outside of their "
      "blocks; trained further, it changes the whole kernel"
    )
  if form == "orbax":
    orbax_adapter.write_adapter(folder, saved)
  elif form in adapters.PLAIN:
    # As it is stored: reading the adapter may have given each use a weight of its own.
    stored = registry.outline(registry.read_config(loaded.folder))
    target = plain.Base(
      loaded.keymap, gguf.heads(loaded.config), bool(stored.keymap.ties)
    )
    module = adapters.PLAIN[form]
    factors = plain.of_adapter(theirs.adapter, loaded.keymap, module.TOOL)
    with atomic.new_folder(folder, overwrite=True) as scratch:
      module.write(scratch, factors, target)
    if not module.HAS_ALPHA:
      notes.append(_alpha_note(folder / module.FILE, factors.alpha))
  elif form == "vllm":
    vllm.write_adapter(
      folder, theirs, loaded.keymap, max_rank=max_rank or vllm.DEFAULT_MAX_RANK
    )
  elif form == "peft":
    peft.write_adapter(
      folder,
      theirs.adapter,
      loaded.keymap,
      theirs.config,
      base_name=saved.base_name,
      revision=saved.revision,
      task_type=saved.task_type,
      labels=saved.labels,
      problem_type=saved.problem_type,
      params=loaded.params,
      dtypes=saved.dtypes or "float32",
    )
  else:
    used = loralib.write_adapter(
      folder, theirs.adapter, loaded.keymap, enable_lora=enable_lora or parts
    )
    notes.append(_alpha_note(folder / loralib.FILE, used))
  return saved, loaded.keymap, notes


def _alpha_note(file: Path, alpha: float) -> str:
  return f"{file} is for lora_alpha={alpha:g}, not stored there"


def table(saved: Saved, keymap: KeyMap) -> str:
  """A table of an adapter: a line for each module."""
  rows = []
  for path, delta in saved.adapter.items():
    # Trained states beside the base's weights have no module there.
    modules = path_to_modules(keymap, path) if path in keymap.keys else [path]
    name = modules[0] if len(modules) == 1 else f"{modules[0]}, … ({len(modules)})"
    rows.append((name, *_row(path, delta, saved.config.use_rslora)))
  header = ("module", "method", "rank", "alpha", "shapes", "dtype")
  return text_table.render(header, rows)


def _row(path: str, delta: Delta, use_rslora: bool) -> tuple[str, ...]:
  name = type(delta).__name__
  if isinstance(delta, Tuned):
    name = f"{name} {path.rpartition('/')[2]}"
  rank, axes = delta.rank, delta.axes
  shown = [n for n in delta.trained if not rank or "rank" in axes[n]]
  leaves = [delta.leaves()[n] for n in shown]
  shapes, dtype = " ".join(_shape(x.shape) for x in leaves), leaves[0].dtype.name
  if not isinstance(delta, KernelDelta):
    return name, "", "", shapes, dtype
  divisor = math.sqrt(rank) if use_rslora else rank
  alphas = sorted({float(scale) * divisor for scale in np.ravel(delta.scales())})
  return name, str(rank), ", ".join(f"{x:g}" for x in alphas), shapes, dtype


def _shape(shape: Iterable[int]) -> str:
  return "×".join(map(str, shape))


def _bools(texts: Sequence[str] | None) -> list[bool] | None:
  """Values of --enable_lora's words."""
  if texts is None:
    return None
  known = {"true": True, "1": True, "false": False, "0": False}
  for text in texts:
    if text.lower() not in known:
      raise LoraxError(unknown("word in --enable_lora", text, ("true", "false")))
  return [known[text.lower()] for text in texts]


def main() -> None:
  saved, keymap, notes = convert(
    BASE.value,
    FROM.value,
    TO.value,
    FORMAT.value,
    alpha=ALPHA.value,
    enable_lora=_bools(ENABLE_LORA.value),
    max_rank=MAX_RANK.value,
    overwrite=OVERWRITE.value,
    quant=QUANT.value,
    other_base=OTHER_BASE.value,
  )
  print(table(saved, keymap))
  for line in (*notes, f"Adapter ({FORMAT.value}): {TO.value}"):
    print(line)


if __name__ == "__main__":
  cli.run(main, FLAGS)

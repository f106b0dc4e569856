"""Reads an adapter of any form and writes it in another.

  python -m experiments.convert --base=B --from=A --to=DIR \
    [--format=peft|loralib|vllm|orbax]

A is a PEFT folder, a folder that this command wrote, or a state dict of loralib (.bin,
.pt, .safetensors; it does not hold --alpha, nor --enable_lora where layers are merged).
What was read is printed. DIR then holds the adapter, whole, or nothing is written. Our
own form, orbax, keeps all that PEFT's says: the way back gives the same tensors.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments.cli import command as cli
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.files import atomic
from lorax_flax.hub.adapters import any as adapters
from lorax_flax.hub.adapters import loralib, vllm
from lorax_flax.hub.adapters import native as orbax_adapter
from lorax_flax.hub.adapters.native import Saved
from lorax_flax.hub.checkpoints.keymap import KeyMap, path_to_modules
from lorax_flax.hub.peft import folder as peft
from lorax_flax.hub.resolve import resolve
from lorax_flax.methods import Delta, Rows, Tuned
from lorax_flax.models import registry

FORMATS = ("orbax", "peft", "loralib", "vllm")

FLAGS = flags.FlagValues()
BASE = flags.DEFINE_string(
  "base",
  None,
  "The base: a folder, a name on the Hugging Face hub, or an alias (minilm).",
  flag_values=FLAGS,
  required=True,
)
FROM = flags.DEFINE_string(
  "from", None, "The adapter: a folder or a file.", flag_values=FLAGS, required=True
)
TO = flags.DEFINE_string(
  "to", None, "The folder to write.", flag_values=FLAGS, required=True
)
FORMAT = flags.DEFINE_string(
  "format", "orbax", f"What to write: {', '.join(FORMATS)}.", flag_values=FLAGS
)
ALPHA = flags.DEFINE_float(
  "alpha", None, "lora_alpha of a loralib file.", flag_values=FLAGS
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
OVERWRITE = flags.DEFINE_bool(
  "overwrite", False, "Replace an adapter that lies in --to.", flag_values=FLAGS
)


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
) -> tuple[Saved, KeyMap, list[str]]:
  """Converts; see the flags.

  Returns:
    What was read, the base's key map, and what to tell the user.
  """
  folder, given = Path(to).expanduser(), Path(source).expanduser()
  if form not in FORMATS:
    raise LoraxError(unknown("--format", form, FORMATS))
  if max_rank is not None and form != "vllm":
    raise LoraxError("--max_rank is vLLM's: it goes with --format=vllm")
  atomic.refuse_unless_free(folder, lambda old: overwrite)
  if given.resolve().is_relative_to(folder.resolve()):
    raise LoraxError(f"--to={to} would replace {source}, which is read from")
  where = resolve(base)
  model = registry.outline(registry.read_config(where))
  outputs = adapters.num_labels(given, model.keymap)
  loaded = registry.load(where, num_labels=outputs, new_head=outputs is not None)
  if where.resolve().is_relative_to(folder.resolve()):
    raise LoraxError(f"--to={to} would replace {base}, which is read from")
  is_loralib = adapters.form(given) == "loralib"
  saved = adapters.read(
    given,
    loaded.params,
    loaded.keymap,
    alpha=alpha,
    # Of what is read where that is loralib's, else of what is written.
    enable_lora=enable_lora if is_loralib or form != "loralib" else None,
  )
  if is_loralib:
    saved = dataclasses.replace(saved, base_name=base)
  said = []
  if form == "orbax":
    orbax_adapter.write_adapter(folder, saved)
  elif form == "vllm":
    vllm.write_adapter(
      folder, saved, loaded.keymap, max_rank=max_rank or vllm.DEFAULT_MAX_RANK
    )
  elif form == "peft":
    peft.write_adapter(
      folder,
      saved.adapter,
      loaded.keymap,
      saved.config,
      base_name=saved.base_name,
      revision=saved.revision,
      task_type=saved.task_type,
      labels=saved.labels,
      params=loaded.params,
      dtypes=saved.dtypes or "float32",
    )
  else:
    used = loralib.write_adapter(
      folder, saved.adapter, loaded.keymap, enable_lora=enable_lora
    )
    said.append(f"{folder / loralib.FILE} is for lora_alpha={used:g}, not stored there")
  return saved, loaded.keymap, said


def table(saved: Saved, keymap: KeyMap) -> str:
  """What was read: a line for each module, in columns."""
  rows: list[tuple[str, ...]] = [
    ("module", "method", "rank", "alpha", "shapes", "dtype")
  ]
  for path, delta in saved.adapter.items():
    modules = path_to_modules(keymap, path)
    name = modules[0] if len(modules) == 1 else f"{modules[0]}, … ({len(modules)})"
    rows.append((name, *_row(path, delta, saved.config.use_rslora)))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(_line(row, widths) for row in rows)


def _row(path: str, delta: Delta, use_rslora: bool) -> tuple[str, ...]:
  name = type(delta).__name__
  if isinstance(delta, Tuned):
    kind = f"{name} {path.rpartition('/')[2]}"
    return kind, "", "", _shape(delta.value.shape), delta.value.dtype.name
  if isinstance(delta, Rows):
    return name, "", "", _shape(delta.rows.shape), delta.rows.dtype.name
  divisor = math.sqrt(delta.rank) if use_rslora else delta.rank
  alphas = sorted({float(scale) * divisor for scale in np.ravel(delta.scale)})
  shapes = " ".join(map(_shape, (delta.a.shape, delta.b.shape)))
  said = ", ".join(f"{alpha:g}" for alpha in alphas)
  return name, str(delta.rank), said, shapes, delta.a.dtype.name


def _shape(shape: Iterable[int]) -> str:
  return "×".join(map(str, shape))


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
  cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
  return "  ".join(cells).rstrip()


def _bools(texts: Sequence[str] | None) -> list[bool] | None:
  """--enable_lora's words."""
  if texts is None:
    return None
  known = {"true": True, "1": True, "false": False, "0": False}
  for text in texts:
    if text.lower() not in known:
      raise LoraxError(unknown("word in --enable_lora", text, ("true", "false")))
  return [known[text.lower()] for text in texts]


def main() -> None:
  saved, keymap, said = convert(
    BASE.value,
    FROM.value,
    TO.value,
    FORMAT.value,
    alpha=ALPHA.value,
    enable_lora=_bools(ENABLE_LORA.value),
    max_rank=MAX_RANK.value,
    overwrite=OVERWRITE.value,
  )
  print(table(saved, keymap))
  for line in (*said, f"Adapter ({FORMAT.value}): {TO.value}"):
    print(line)


if __name__ == "__main__":
  cli.run(main, FLAGS)

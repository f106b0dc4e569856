"""Writes a base with an adapter merged in: Hugging Face's form, orbax, GGUF, StableHLO.

  python -m experiments.merge --base=minilm --adapter=RUN/adapter --out=DIR
  python -m experiments.merge --base=smollm2 --adapter=RUN/adapter --out=DIR \
    --format=gguf --dtype=q8_0

DIR then holds config.json, model.safetensors (of more than 5 GB, shards of it) and what
lies beside the base's weights:
its tokenizer (or the adapter's own), templates, settings; and a model card of its own
in the place of the base's. transformers loads it as it
would any other, and so does --base here. It is written atomically.

receipt.json says how much of the adapter's change is left after rounding to the stored
numbers, and how far logits of a few random inputs are from those of the adapter beside
the base. A change of which less than --min_kept is left is refused.

Weights are read, merged and written one after another. The logits alone need a model in
memory: with --noprobe it may be larger than that, and the receipt has null for them.

With --quant=nf4 the kernels are those that nf4 makes of the base, as an adapter knows
them that was trained beside such; what is written is dense, in the base's dtype, which
transformers loads. The receipt also says what would be left were it quantised again.

--format=orbax writes params/ instead, the params tree as NumPy arrays, which orbax
restores without this package.

--format=gguf writes model.gguf instead, which llama.cpp loads, with the tokenizer and
the chat template inside. Its matrices keep their dtype unless --dtype names another.

--format=stablehlo writes model.stablehlo, which jax.export reads in a process without
this package, on CPUs, GPUs and TPUs: weights and inputs to logits, of any batch and of
texts of any length up to the model's. model.safetensors has the weights and params.json
the order of the arguments; the code that runs it is in README.md.
"""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

from experiments.cli import command as cli
from experiments.cli import model_flags
from experiments.inference import merged
from experiments.inference.forms import FORMS
from lorax_flax.errors import LoraxError, check_known
from lorax_flax.files import atomic
from lorax_flax.hub import card
from lorax_flax.hub.checkpoints import export_gguf
from lorax_flax.hub.files import gguf_writer
from lorax_flax.jobs import receipt as receipts
from lorax_flax.jobs import usage
from lorax_flax.models import gguf, registry

FLAGS = flags.FlagValues()
BASE = model_flags.base(FLAGS)
ADAPTER = model_flags.adapter(FLAGS)
OUT = model_flags.out(FLAGS)
FORMAT = flags.DEFINE_string(
  "format",
  "transformers",
  f"The form of what is written: {', '.join(FORMS)}.",
  flag_values=FLAGS,
)
DTYPE = flags.DEFINE_string(
  "dtype",
  None,
  f"The numbers of a GGUF file's matrices: {', '.join(gguf_writer.KINDS)} (default:"
  " as they are).",
  flag_values=FLAGS,
)
QUANT = model_flags.quant(FLAGS)
OTHER_BASE = model_flags.other_base(FLAGS)
MIN_KEPT = flags.DEFINE_float(
  "min_kept",
  0.99,
  "The least share of the adapter's change that the stored numbers may keep.",
  lower_bound=0.0,
  upper_bound=1.0,
  flag_values=FLAGS,
)
PROBE = flags.DEFINE_bool(
  "probe",
  True,
  "Compare logits, for which the model has to fit in memory; --noprobe merges a model"
  " that does not.",
  flag_values=FLAGS,
)
OVERWRITE = model_flags.overwrite(FLAGS, "a checkpoint in --out that was written here")


def merge(
  base: str,
  adapter: str,
  out: str,
  form: str = "transformers",
  *,
  dtype: str | None = None,
  quant: str | None = None,
  other_base: bool = False,
  min_kept: float = 0.99,
  probe: bool = True,
  overwrite: bool = False,
) -> dict[str, Any]:
  """Merges and writes; see the flags. Returns the content of receipt.json."""
  check_known("--format", form, FORMS)
  if dtype is not None:
    check_known("--dtype", dtype, gguf_writer.KINDS)
    if form != "gguf":
      raise LoraxError("--dtype is a GGUF file's: it goes with --format=gguf")
  folder = Path(out).expanduser()
  atomic.refuse_inputs(folder, (Path(base).expanduser(), Path(adapter).expanduser()))
  atomic.refuse_unless_free(folder, overwrite=overwrite)
  loaded, deltas = merged.read(base, adapter, quant, other_base, deferred=True)
  store: receipts.Store = lambda path, leaf: leaf
  if dtype is not None:
    about = gguf.describe(loaded)
    store = export_gguf.stored(loaded.keymap, about.architecture, about.config, dtype)
  stores = {"stored": store}
  if quant is not None:
    stores["requantized"] = receipts.requantized(loaded)
  params, figures = receipts.merge(loaded, deltas, stores, probe=probe)
  _check(figures["stored"], min_kept)
  receipt: dict[str, Any] = {"base": base, "adapter": adapter, "quant": quant}
  receipt |= {name: dataclasses.asdict(found) for name, found in figures.items()}
  loaded = dataclasses.replace(loaded, params=params)
  FORMS[form].write(
    folder,
    loaded,
    base,
    Path(adapter).expanduser(),
    dtype,
    card=_card(base, adapter, loaded, form),
    receipt=receipt,
    overwrite=overwrite,
  )
  return receipt


def _check(found: receipts.Figures, min_kept: float) -> None:
  """Refuses a change that rounding takes away, or enlarges."""
  if abs(1 - found.kept) > 1 - min_kept and found.least is not None:
    share, path = found.least
    error = found.largest_logit_difference
    on_probe = f" On the probe, logits would differ by up to {error or 0:.3g}."
    raise LoraxError(
      f"the stored numbers would keep {found.kept:.1%} of the adapter's change, the"
      f" rest is rounded away; the least, {share:.1%}, of {path}."
      f"{'' if error is None else on_probe}"
      f" --min_kept={max(0, 1 - abs(1 - found.kept)):.2f} writes them all the same"
    )


def _card(base: str, adapter: str, model: registry.Loaded, form: str) -> str:
  data = {
    "base_model": card.base_model(base),
    "library_name": FORMS[form].library,
    **card.license_of(base, model.folder),
    "pipeline_tag": usage.PIPELINES[model.family.task],
    "tags": ["lorax_flax", "lora", "merged"],
  }
  parts = {"Parts": {"base": base, "adapter": adapter}}
  title = f"{base} with an adapter merged in"
  return card.text(title, data, parts, FORMS[form].usage(model))


def main() -> None:
  receipt = merge(
    BASE.value,
    ADAPTER.value,
    OUT.value,
    FORMAT.value,
    dtype=DTYPE.value,
    quant=QUANT.value,
    other_base=OTHER_BASE.value,
    min_kept=MIN_KEPT.value,
    probe=PROBE.value,
    overwrite=OVERWRITE.value,
  )
  for name, found in receipt.items():
    if isinstance(found, dict):
      error = found["largest_logit_difference"]
      logits = "are not compared" if error is None else f"differ by up to {error:.3g}"
      print(f"{name}: {found['kept']:.1%} of the change is kept, logits {logits}")
  print(f"Merged checkpoint: {OUT.value}")


if __name__ == "__main__":
  cli.run(main, FLAGS)

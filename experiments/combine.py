"""Writes the weighted sum of adapters as one LoRA, in PEFT's form.

  python -m experiments.combine --base=B --adapter=A1 --adapter=A2 --weights=0.7,0.3 \
    --type=svd --rank=8 --out=DIR

--type is as in PEFT's add_weighted_adapter: linear and cat sum factors; svd sums the
changes of the kernels, cut to --rank; magnitude_prune, ties, dare_linear and dare_ties
keep --density of the factors' entries, with _svd at the end of the changes'.
--weights=-1 negates one adapter; --type=svd makes a LoRA of one of any method, and
prints what is lost. Heads and rows that the adapters train must be the same in all.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from absl import flags

from experiments.cli import command as cli
from experiments.cli import model_flags
from lorax_flax.adapt import algebra
from lorax_flax.errors import LoraxError
from lorax_flax.files import atomic
from lorax_flax.hub.peft import folder as peft
from lorax_flax.models import with_adapter

FLAGS = flags.FlagValues()
BASE = model_flags.base(FLAGS)
QUANT = model_flags.quant(FLAGS)
OTHER_BASE = model_flags.other_base(FLAGS)
ADAPTERS = flags.DEFINE_multi_string(
  "adapter",
  None,
  "An adapter of any form, of this base; give it once for each.",
  flag_values=FLAGS,
  required=True,
)
WEIGHTS = flags.DEFINE_list(
  "weights", None, "A number for each adapter; 1 by default.", flag_values=FLAGS
)
TYPE = flags.DEFINE_string(
  "type", "svd", f"The way to sum: {', '.join(algebra.TYPES)}.", flag_values=FLAGS
)
DENSITY = flags.DEFINE_float(
  "density", None, "The share of entries that pruning keeps.", flag_values=FLAGS
)
RANK = flags.DEFINE_integer(
  "rank",
  None,
  "The rank that an SVD cuts to (default: the largest).",
  flag_values=FLAGS,
)
MAJORITY = flags.DEFINE_string(
  "majority_sign_method",
  None,
  f"How ties elects signs: {' or '.join(algebra.MAJORITIES)} (default: total).",
  flag_values=FLAGS,
)
SEED = flags.DEFINE_integer(
  "seed", None, "Of the entries that dare keeps (default: 0).", flag_values=FLAGS
)
OUT = model_flags.out(FLAGS)
OVERWRITE = model_flags.overwrite(FLAGS, "an adapter in --out that was written here")


def combine(
  base: str,
  adapters: Sequence[str],
  out: str,
  *,
  weights: Sequence[float] | None = None,
  combination: str = "svd",
  density: float | None = None,
  rank: int | None = None,
  majority: str | None = None,
  seed: int | None = None,
  overwrite: bool = False,
  quant: str | None = None,
  other_base: bool = False,
) -> algebra.Combined:
  """Combines and writes; see the flags."""
  folder = Path(out).expanduser()
  sources = [Path(each).expanduser() for each in adapters]
  atomic.refuse_inputs(folder, (Path(base).expanduser(), *sources))
  atomic.refuse_unless_free(folder, overwrite=overwrite)
  is_random = combination.startswith("dare_")
  if seed is not None and not is_random:
    raise LoraxError(f"--seed does nothing in {combination}: dare alone draws")
  loaded, several = with_adapter.load_all(
    base, sources, quant=quant, other_base=other_base
  )
  combined = algebra.combine_adapters(
    loaded.params,
    [each.adapter for each in several],
    [1.0] * len(several) if weights is None else weights,
    combination,
    rank=rank,
    density=density,
    majority=majority,
    keep=algebra.bernoulli(density or 0.0, seed or 0) if is_random else None,
  )
  first = several[0]
  config = replace(
    first.config, method="lora", options={}, use_rslora=False, init="uniform"
  )
  peft.write_adapter(
    folder,
    combined.adapter,
    loaded.keymap,
    config,
    base_name=first.base_name,
    revision=first.revision,
    task_type=first.task_type,
    labels=first.labels,
    problem_type=first.problem_type,
    params=loaded.params,
  )
  return combined


def report(combined: algebra.Combined) -> str:
  """Lines for the user: what was written, and what an SVD cut off."""
  ranks = sorted({delta.rank for delta in combined.adapter.values() if delta.rank})
  lines = [f"{len(combined.adapter)} weights, ranks {', '.join(map(str, ranks))}"]
  if combined.errors:
    worst = max(combined.errors, key=lambda path: combined.errors[path])
    lines.append(
      f"cut off: at most {combined.errors[worst]:.3g} of a change's norm, at {worst}"
    )
  return "\n".join(lines)


def _numbers(texts: Sequence[str] | None) -> list[float] | None:
  try:
    return None if texts is None else [float(text) for text in texts]
  except ValueError as error:
    raise LoraxError(f"--weights={','.join(texts or ())}: {error}") from error


def main() -> None:
  combined = combine(
    BASE.value,
    ADAPTERS.value,
    OUT.value,
    weights=_numbers(WEIGHTS.value),
    combination=TYPE.value,
    density=DENSITY.value,
    rank=RANK.value,
    majority=MAJORITY.value,
    seed=SEED.value,
    overwrite=OVERWRITE.value,
    quant=QUANT.value,
    other_base=OTHER_BASE.value,
  )
  print(report(combined))
  print(f"Adapter (peft): {OUT.value}")


if __name__ == "__main__":
  cli.run(main, FLAGS)

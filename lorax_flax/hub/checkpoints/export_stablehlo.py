"""A model written as StableHLO, which runs without the code that made it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.export import Exported

from lorax_flax.files import atomic
from lorax_flax.files.workdir import write_json
from lorax_flax.hub.checkpoints import export
from lorax_flax.hub.files import safetensors_writer

FILE = "model.stablehlo"
ARGUMENTS = "params.json"


def write(
  folder: Path,
  program: Exported,
  leaves: Mapping[str, Any],
  *,
  labels: Mapping[str, str] | None,
  base: Path,
  adapter: Path | None = None,
  card: str,
  receipt: Mapping[str, Any] | None = None,
  overwrite: bool,
) -> None:
  """Writes a folder with model.stablehlo, weights and tokenizer, all or nothing.

  params.json has the program's arguments in their order: `params`, the tensors of
  model.safetensors, then `inputs`; each with name, shape and dtype. A size that is a
  name is any number. It also has `outputs`, `platforms`, and a classifier's `labels`.

  Args:
    program: (weights by path, inputs by name) -> logits; see `models.stablehlo`.
    leaves: the weights, by path; see `export.leaves`. They are written one at a time.
    labels: names of the outputs by index; None where they are a vocabulary.
    base, adapter, card, receipt, overwrite: as of `export.write_checkpoint`.

  Raises:
    LoraxError: the destination is taken, or can't be written; a weight that is not
      finite.
  """
  (weights, inputs), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
  about: dict[str, Any] = {
    "platforms": program.platforms,
    "params": _rows(weights),
    "inputs": _rows(inputs),
    "outputs": _rows({"logits": program.out_avals[0]}),
  }
  if labels is not None:
    about["labels"] = labels
  with atomic.new_folder(folder, overwrite=overwrite) as scratch:
    safetensors_writer.write(scratch, leaves, export.finite(leaves))
    export.write_beside(scratch, base, adapter, card, receipt)
    (scratch / FILE).write_bytes(program.serialize())
    write_json(scratch / ARGUMENTS, about)


def _rows(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Arguments in the order in which JAX flattens them."""
  return [
    {
      "name": name,
      "shape": [n if isinstance(n, int) else str(n) for n in like.shape],
      "dtype": str(like.dtype),
    }
    for name, like in sorted(arguments.items())
  ]

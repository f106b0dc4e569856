"""A model written as a Hugging Face checkpoint that transformers loads."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_flax.adapt.paths import flatten
from lorax_flax.errors import LoraxError, listing
from lorax_flax.files import atomic
from lorax_flax.files.workdir import write_json
from lorax_flax.hub.checkpoints import beside
from lorax_flax.hub.checkpoints.keymap import KeyMap, file_key
from lorax_flax.hub.files import gguf_header, gguf_tokenizer, safetensors_writer
from lorax_flax.quant import dense
from lorax_flax.sharding import mesh as meshes

RECEIPT = "receipt.json"
# (folder, leaves by path, keymap)
WriteWeights = Callable[[Path, Mapping[str, Any], KeyMap], None]


def write_safetensors(folder: Path, leaves: Mapping[str, Any], keymap: KeyMap) -> None:
  """Writes the weights as transformers does, one leaf at a time."""
  safetensors_writer.write(folder, likes(leaves, keymap), tensors(leaves, keymap))


def write_checkpoint(
  folder: str | Path,
  params: Any,
  keymap: KeyMap,
  hf_config: Mapping[str, Any],
  *,
  architecture: str,
  labels: Sequence[str] | None,
  problem_type: str | None = None,
  base: Path,
  adapter: Path | None = None,
  card: str | None = None,
  receipt: Mapping[str, Any] | None = None,
  write_weights: WriteWeights = write_safetensors,
  overwrite: bool,
) -> None:
  """Writes config.json, the weights and what lies beside these; all or nothing.

  Args:
    folder: the destination.
    params: the model's tree; each leaf is stored in its own dtype, quantised ones
      dense. Leaves are made (`quant.Deferred`), gathered and written one at a time.
    keymap: of the model.
    hf_config: of the base.
    architecture: transformers' class of the model.
    labels: names of a new head's outputs (see `with_head`); None keeps `hf_config`'s.
    problem_type: of that head; see `with_head`.
    base: a folder whose files beside the weights are copied; a GGUF file's tokenizer
      is converted.
    adapter: a folder whose tokenizer takes the place of the base's, if it has one.
    card: the text of README.md, in the place of the base's.
    receipt: the content of receipt.json.
    write_weights: (folder, leaves by path, keymap) of the form of the weights.
    overwrite: whether to replace a folder that was written here.

  Raises:
    LoraxError: the destination is taken, or can't be written; a weight that is not
      finite.
  """
  with atomic.new_folder(Path(folder), overwrite=overwrite) as scratch:
    config = to_hf_config(hf_config, architecture, labels, problem_type)
    text = json.dumps(config, indent=2, sort_keys=True)
    (scratch / "config.json").write_text(f"{text}\n", encoding="utf-8")
    write_weights(scratch, leaves(params, keymap), keymap)
    write_beside(scratch, base, adapter, card, receipt)


def write_beside(
  folder: Path,
  base: Path,
  adapter: Path | None,
  card: str | None,
  receipt: Mapping[str, Any] | None,
) -> None:
  """Writes what lies beside a model's weights; arguments as of `write_checkpoint`."""
  beside.copy(base, folder, adapter)
  if card is not None:
    (folder / atomic.README).write_text(card, encoding="utf-8")
  if receipt is not None:
    write_json(folder / RECEIPT, receipt)
  file = gguf_header.find(base)
  if file is not None and not (folder / "tokenizer.json").is_file():
    gguf_tokenizer.write(file, folder)


def to_hf_config(
  hf_config: Mapping[str, Any],
  architecture: str,
  labels: Sequence[str] | None,
  problem_type: str | None = None,
) -> dict[str, Any]:
  """The base's config.json with another architecture and maybe another head."""
  config = dict(hf_config)
  # transformers would cast to the base's dtype; without it, it keeps the weights'.
  for name in ("_name_or_path", "dtype", "torch_dtype"):
    config.pop(name, None)
  config["architectures"] = [architecture]
  return config if labels is None else with_head(config, labels, problem_type)


def with_head(
  hf_config: Mapping[str, Any], labels: Sequence[str], problem_type: str | None = None
) -> dict[str, Any]:
  """A config.json whose head has these outputs.

  Args:
    labels: their names; one alone is a regression's.
    problem_type: transformers'; None leaves it to the number of labels.
  """
  config = dict(hf_config)
  for name in ("num_labels", "problem_type", "_num_labels"):
    config.pop(name, None)
  config |= {
    "id2label": {str(i): name for i, name in enumerate(labels)},
    "label2id": {name: i for i, name in enumerate(labels)},
  }
  if problem_type is not None or len(labels) == 1:
    config["problem_type"] = problem_type or "regression"
  return config


def to_tensors(params: Any, keymap: KeyMap) -> dict[str, np.ndarray]:
  """The tensors of a checkpoint, by key, of a params tree.

  Raises:
    LoraxError: a leaf that no checkpoint has; a number that is not finite.
  """
  found = tensors(leaves(params, keymap), keymap)
  return {key: np.ascontiguousarray(value) for key, value in found}


def tensors(
  leaves: Mapping[str, Any], keymap: KeyMap
) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors of a checkpoint with their keys, as views of one leaf after another.

  Args:
    leaves: of `leaves`.

  Raises:
    LoraxError: a number that is not finite; it names the weight.
  """
  for path, value in gathered(leaves):
    for bare in keymap.keys[path]:
      site = keymap.sites[bare]
      key, part = file_key(keymap, bare), value[site.place(value.shape)]
      check_finite(key, part)
      yield key, site.entry.form.to_stored(part)


def likes(leaves: Mapping[str, Any], keymap: KeyMap) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes and dtypes of `tensors`, in their order."""
  found = {}
  for path, leaf in leaves.items():
    for bare in keymap.keys[path]:
      site = keymap.sites[bare]
      shape = site.entry.form.stored_shape(site.shape(leaf.shape))
      found[file_key(keymap, bare)] = jax.ShapeDtypeStruct(shape, leaf.dtype)
  return found


def gathered(leaves: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
  """Leaves in full on this host, dense, one after another.

  A leaf that is sharded over processes is gathered when it is taken: all of them have
  to iterate.
  """
  for path, leaf in leaves.items():
    yield path, np.asarray(meshes.gather(dense(leaf)))


def finite(leaves: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
  """Leaves as `gathered` gives them, each finite.

  Raises:
    LoraxError: a number that is not finite; it names the leaf.
  """
  for path, value in gathered(leaves):
    check_finite(path, value)
    yield path, value


def leaves(params: Any, keymap: KeyMap) -> dict[str, Any]:
  """The leaves of a params tree by path.

  Raises:
    LoraxError: a leaf that no checkpoint has.
  """
  found = flatten(params)
  if beside := [path for path in found if path not in keymap.keys]:
    raise LoraxError(
      f"a checkpoint of a {keymap.family} has no place for {listing(beside, most=4)}: "
      "such trained states can't be merged. experiments.predict and generate apply the "
      "adapter that has them (--adapter)"
    )
  return found


def check_finite(key: str, value: np.ndarray) -> None:
  """Refuses a tensor with a number that is not finite, by its key."""
  if wrong := np.size(value) - np.count_nonzero(np.isfinite(value)):
    raise LoraxError(
      f"{key} would be written with {wrong:,} of its {np.size(value):,} numbers NaN "
      f"or infinite: base or adapter has such numbers, or their sum is beyond the "
      f"largest {value.dtype}, {float(jnp.finfo(value.dtype).max):.3g}"
    )

"""State dicts of loralib, the LoRA paper's own package (github.com/microsoft/LoRA).

Keys are "MODULE.lora_A" and "MODULE.lora_B", without ".weight", beside whatever else
was trained under its usual key. Of a Linear and an Embedding, A is (r, in) and B (out,
r). A MergedLinear is one kernel of several parts side by side (GPT-2's c_attn: query,
key, value), of which `enable_lora` says which n have factors of their own: A is (n r,
in), the n factors stacked, and B (n out / parts, r). The scale is alpha / r; neither
alpha nor enable_lora is stored, so whoever reads a file has to know them.

Here a MergedLinear is an ordinary LoRA of rank n r: A as it is, and B's blocks on the
diagonal, each in its part of the outputs, zero elsewhere. The delta is the same.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lorax_flax.adapt import stacking
from lorax_flax.adapt.config import LoraConfig
from lorax_flax.adapt.paths import flatten
from lorax_flax.adapt.stacking import Index
from lorax_flax.errors import LoraxError, listing
from lorax_flax.files import atomic
from lorax_flax.hub.checkpoints import entries as rows
from lorax_flax.hub.checkpoints import keymap as km
from lorax_flax.hub.checkpoints.entries import Site
from lorax_flax.hub.files import torch_file
from lorax_flax.hub.files.safetensors import open_file
from lorax_flax.methods import Adapter, LoRA, Tuned

# The file of a folder that we write.
FILE = "lora.bin"
_FACTORS = re.compile(r"(.+)\.lora_([AB])")
_KINDS = ("linear", "embedding")
# The leaf of ours that each of the two is.
_LEAVES = {x: LoRA.peft.keys["linear"][f"lora_{x}.weight"][0] for x in "AB"}


class Factors(NamedTuple):
  """One layer's: A (in, rank), B (rank, out), and the factor of A @ B."""

  in_r: np.ndarray
  r_out: np.ndarray
  scale: float


def is_state_dict(path: Path) -> bool:
  """Checks whether a file is loralib's, by the names of its tensors."""
  if not path.is_file():
    return False
  if torch_file.is_torch_file(path):
    return any(map(_FACTORS.fullmatch, torch_file.read(path)))
  try:
    return any(map(_FACTORS.fullmatch, open_file(path)))
  except LoraxError:
    return False


def read_adapter(
  file: str | Path,
  params: Any,
  keymap: km.KeyMap,
  *,
  alpha: float,
  enable_lora: Sequence[bool] | None = None,
) -> tuple[Adapter, LoraConfig]:
  """Reads a state dict of loralib.

  Args:
    file: written by torch.save, or safetensors.
    params: the base's tree; its layers stacked if `keymap.scan`.
    keymap: of the base.
    alpha: lora_alpha of every module.
    enable_lora: of every MergedLinear, one a part; None where there are none.

  Returns:
    The adapter, float32, and a config that describes it.

  Raises:
    LoraxError: a damaged file, an unknown key, a tensor of another shape than the
      base's, a MergedLinear that enable_lora does not describe, a convolution.
  """
  file = Path(file).expanduser()
  if not alpha > 0:
    raise LoraxError(f"loralib's alpha must be above 0, not {alpha}")
  try:
    return of_tensors(_load(file), flatten(params), keymap, alpha, enable_lora)
  except LoraxError as error:
    said = str(error)
    raise LoraxError(said if str(file) in said else f"{file}: {said}") from error


def num_labels(file: str | Path, keymap: km.KeyMap) -> int | None:
  """The number of labels of the head in a file; None where it has none."""
  tensors = _load(Path(file).expanduser())
  return km.num_labels(keymap, {key: x.shape for key, x in tensors.items()})


def _load(file: Path) -> dict[str, np.ndarray]:
  """The tensors as they are stored, all of them floating-point."""
  if not file.is_file():
    raise LoraxError(f"no file {file}")
  if torch_file.is_torch_file(file):
    tensors = torch_file.read(file)
  else:
    try:
      tensors = dict(open_file(file))
    except LoraxError as error:
      raise LoraxError(
        f"cannot read {file}: neither torch's zip format nor safetensors ({error})"
      ) from error
  if not any(map(_FACTORS.fullmatch, tensors)):
    raise LoraxError(
      f"{file} has no lora_A, so it is not loralib's. It holds: {listing(tensors, 6)}"
    )
  for key, tensor in tensors.items():
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
      raise LoraxError(f"{key} holds {tensor.dtype}, not floating-point numbers")
  return tensors


def of_tensors(
  tensors: Mapping[str, np.ndarray],
  leaves: Mapping[str, Any],
  keymap: km.KeyMap,
  alpha: float,
  enable_lora: Sequence[bool] | None = None,
) -> tuple[Adapter, LoraConfig]:
  """`read_adapter` of a state dict's tensors; `leaves` are the base's, by path."""
  pairs: dict[str, dict[str, np.ndarray]] = {}
  rest: dict[str, np.ndarray] = {}
  for key, tensor in tensors.items():
    if found := _FACTORS.fullmatch(key):
      pairs.setdefault(found[1], {})[found[2]] = tensor.astype(np.float32)
    else:
      rest[key] = tensor.astype(np.float32)
  factors: dict[str, dict[Index, dict[str, np.ndarray]]] = {}
  scales: dict[str, list[float]] = {}
  alphas: dict[str, float] = {}
  unused = enable_lora is not None
  for module, pair in pairs.items():
    site, shape = _target(module, keymap, leaves)
    if len(pair) == 1:
      raise LoraxError(f"{module} has lora_{next(iter(pair))} alone")
    a, b = pair["A"], pair["B"]
    parts = 1
    if a.shape[::-1] != (shape[0], b.shape[-1]) or len(b) != shape[1]:
      b = _widened(module, a, b, shape, enable_lora)
      parts, unused = sum(enable_lora or ()), False
    scales.setdefault(site.path, []).append(alpha * parts / len(a))
    layer = {_LEAVES["A"]: a.T, _LEAVES["B"]: b.T}
    factors.setdefault(site.path, {})[site.index] = layer
    alphas[site.path] = alpha * parts
  if unused:
    raise LoraxError("enable_lora is given, and no module here is a MergedLinear")
  adapter: Adapter = {
    path: stacking.stack(LoRA, layers, scales[path], ("in", "out"), leaves[path].shape)
    for path, layers in factors.items()
  }
  adapter |= _trained_in_full(rest, leaves, keymap)
  return adapter, _config(adapter, alphas, leaves)


def _target(
  module: str, keymap: km.KeyMap, leaves: Mapping[str, Any]
) -> tuple[Site, tuple[int, ...]]:
  """The site of a module's weight in our tree, and its (in, out)."""
  km.module_to_path(keymap, module)  # or an error that names the nearest
  site = keymap.sites[keymap.leaves[module.removeprefix(keymap.prefix)]]
  kind = rows.kind(site.entry)
  if kind not in _KINDS or len(site.index) > 1:
    raise LoraxError(
      f"{module} is a {kind}: of loralib's layers, Linear, MergedLinear and Embedding"
      " are read"
    )
  if site.entry.piece != (0, 1):
    raise LoraxError(f"{module} is a part of {site.path}, which takes one LoRA whole")
  return site, tuple(leaves[site.path].shape[len(site.index) :])


def _widened(
  module: str,
  a: np.ndarray,
  b: np.ndarray,
  shape: tuple[int, ...],
  enable_lora: Sequence[bool] | None,
) -> np.ndarray:
  """A MergedLinear's B as one of a Linear, (out, n r): its blocks on the diagonal."""
  given = f"lora_A {a.shape} and lora_B {b.shape} of {module}, whose weight has" + (
    f" {shape[0]} inputs and {shape[1]} outputs"
  )
  if a.ndim != 2 or b.ndim != 2 or a.shape[1] != shape[0] or not b.size:
    raise LoraxError(f"{given}: these do not fit together")
  if enable_lora is None:
    raise LoraxError(
      f"{given}: if this is a MergedLinear, say which of its parts have factors with"
      " enable_lora, for example true,false,true for GPT-2's c_attn"
    )
  n, width = sum(enable_lora), shape[1] // max(1, len(enable_lora))
  r = b.shape[1]
  if width * len(enable_lora) != shape[1] or len(a) != n * r or len(b) != n * width:
    raise LoraxError(f"{given}: these do not fit enable_lora={list(enable_lora)}")
  wide = np.zeros((shape[1], n * r), np.float32)
  for group, part in enumerate(np.flatnonzero(enable_lora)):
    block = b[group * width : (group + 1) * width]
    wide[part * width : (part + 1) * width, group * r : (group + 1) * r] = block
  return wide


def _trained_in_full(
  tensors: Mapping[str, np.ndarray], leaves: Mapping[str, Any], keymap: km.KeyMap
) -> Adapter:
  values: dict[str, dict[Index, np.ndarray]] = {}
  for key, tensor in tensors.items():
    path, _ = km.key_to_path(keymap, key)
    site = keymap.sites[km.bare_key(keymap, key)]
    shape = leaves[path].shape
    expected = site.entry.form.stored_shape(site.shape(shape))
    if tensor.shape != expected:
      raise LoraxError(
        f"{key} has the shape {tensor.shape}, and {expected} was expected"
      )
    if site.entry.piece != (0, 1) or len(site.index) > 1:
      raise LoraxError(f"{key} is a part of {path}, which is trained whole or not")
    values.setdefault(path, {})[site.index] = site.entry.form.to_ours(tensor)
  return {path: stacking.tuned(each, leaves[path]) for path, each in values.items()}


def _config(
  adapter: Adapter, alphas: Mapping[str, float], leaves: Mapping[str, Any]
) -> LoraConfig:
  ranks = {p: delta.rank for p, delta in adapter.items() if isinstance(delta, LoRA)}
  layers = [d.layers for d in adapter.values() if isinstance(d, LoRA) and d.layers]
  rank, alpha = stacking.most_common(ranks), stacking.most_common(alphas)
  tuned = [path for path, delta in adapter.items() if isinstance(delta, Tuned)]
  biases = {path for path in leaves if path.rpartition("/")[2] == "bias"}
  beside = {f"{path.rpartition('/')[0]}/bias" for path in ranks} & biases
  bias = "none"
  if biases <= set(tuned):
    bias = "all"
  elif beside and beside <= set(tuned):
    bias = "lora_only"
  return LoraConfig(
    targets=tuple(sorted(ranks)),
    rank=rank,
    alpha=alpha,
    rank_pattern={re.escape(p): r for p, r in ranks.items() if r != rank},
    alpha_pattern={re.escape(p): a for p, a in alphas.items() if a != alpha},
    layers=tuple(sorted({i for each in layers for i in each})) or None,
    tuned=tuple(sorted(tuned)),
    bias=bias,
  )


def to_state_dict(
  adapter: Adapter, keymap: km.KeyMap, *, enable_lora: Sequence[bool] | None = None
) -> tuple[dict[str, np.ndarray], float]:
  """An adapter as loralib's state dict, float32, and the alpha that it is for.

  Where the alphas of modules differ, the most common is kept, and the others are
  folded into their lora_B.

  Args:
    adapter: of LoRA, and of leaves trained in full.
    keymap: of the base.
    enable_lora: the parts of a MergedLinear; every kernel whose b is zero outside of
      the blocks of such a layer is written as one.

  Raises:
    LoraxError: a delta that loralib has no layer for; enable_lora that fits nothing.
  """
  factors: dict[str, Factors] = {}
  rest: dict[str, np.ndarray] = {}
  for path, delta in adapter.items():
    if path not in keymap.keys:
      raise LoraxError(f"loralib has no place for {path}, which is no weight of a base")
    for bare in keymap.keys[path]:
      site, key = keymap.sites[bare], km.full_key(keymap, bare)
      if isinstance(delta, Tuned):
        value = np.asarray(delta.now(), np.float32)
        rest[key] = site.entry.form.to_stored(value[site.place(value.shape)])
      elif type(delta) is LoRA and rows.kind(site.entry) in _KINDS:
        if stacking.has_layer(delta, site.index):
          leaves, scale, _ = stacking.unstack(delta, site.index)
          found = Factors(leaves[_LEAVES["A"]], leaves[_LEAVES["B"]], float(scale))
          factors[km.module_of(key)] = found
      else:
        raise LoraxError(
          f"no layer for the {type(delta).__name__} of {path}: such a file holds LoRA's"
          " two factors of linear layers and embeddings alone"
        )
  if not factors:
    raise LoraxError("loralib's file needs one low-rank delta at least; none here")
  if enable_lora is not None:
    narrow = {name: _narrowed(one, enable_lora) for name, one in factors.items()}
    if not any(narrow.values()):
      raise LoraxError(
        f"enable_lora={list(enable_lora)} fits no delta here: none is zero outside of"
        " such blocks"
      )
    factors = {name: narrow[name] or one for name, one in factors.items()}
  alphas = {name: one.scale * one.r_out.shape[0] for name, one in factors.items()}
  alpha = stacking.most_common(alphas)
  tensors = {}
  for name, (a, b, _) in factors.items():
    tensors[f"{name}.lora_A"] = np.ascontiguousarray(a.T)
    ratio = np.float32(alphas[name] / alpha)
    tensors[f"{name}.lora_B"] = np.ascontiguousarray((ratio * b).T)
  return tensors | {k: np.ascontiguousarray(v) for k, v in rest.items()}, alpha


def _narrowed(factors: Factors, enable_lora: Sequence[bool]) -> Factors | None:
  """The inverse of `_widened`, transposed; None where b is not of such blocks."""
  a, b, scale = factors
  n, parts = sum(enable_lora), len(enable_lora)
  if not n or b.shape[0] % n or b.shape[1] % parts or not b.any():
    return None
  blocks = b.reshape(n, b.shape[0] // n, parts, b.shape[1] // parts)
  diagonal = np.zeros(blocks.shape, bool)
  for group, part in enumerate(np.flatnonzero(enable_lora)):
    diagonal[group, :, part] = True
  if blocks[~diagonal].any():
    return None
  kept = [blocks[g, :, part] for g, part in enumerate(np.flatnonzero(enable_lora))]
  return Factors(a, np.concatenate(kept, axis=1), scale)


def write_adapter(
  folder: str | Path,
  adapter: Adapter,
  keymap: km.KeyMap,
  *,
  enable_lora: Sequence[bool] | None = None,
) -> float:
  """Writes a folder with a state dict that torch.load reads; see `to_state_dict`.

  Returns:
    The alpha to read it with, which the file does not hold.
  """
  tensors, alpha = to_state_dict(adapter, keymap, enable_lora=enable_lora)
  with atomic.new_folder(Path(folder).expanduser(), overwrite=True) as scratch:
    torch_file.write(scratch / FILE, tensors)
  return alpha

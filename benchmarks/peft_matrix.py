"""Configurations of PEFT's LoRA, by the fields that its own tests set, and families.

`python -m benchmarks.parity --fields [FAMILY …]` prints it. PEFT makes each adapter on
a tiny random model, all that trains is made random, and its folder is read here as the
commands read one, written again, and read by PEFT.
"""

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lorax_flax as lx
from benchmarks.peers import VOCAB, Peer
from lorax_flax.adapt.merge import without_place
from lorax_flax.hub.peft import folder as hub_peft
from lorax_flax.models import registry, with_adapter

# Of float32 logits against PEFT's in float64, relative to the largest logit. PEFT's own
# float32 is off by up to 8e-6, in T5 v1.1.
TOLERANCE = 1e-4
_NO_EFFECT = 1e-6


@dataclass(frozen=True)
class Case:
  """A configuration.

  Attributes:
    fields: arguments of PEFT's LoraConfig; a function takes the model.
    task_type: another than the family's.
    resize: number of tokens that the vocabulary is resized to.
  """

  fields: Mapping[str, Any] = field(default_factory=dict)
  task_type: str | None = None
  resize: int | None = None


_TIES = {"ensure_weight_tying": True}
_TOKENS = [5, 7]
CASES: dict[str, Case] = {
  "targets of the family": Case(),
  "default targets": Case({"target_modules": None}),
  "all-linear": Case({"target_modules": "all-linear"}),
  "a regular expression": Case({"target_modules": r".*\.(q|v|query|c_attn|q_proj)"}),
  "exclude_modules": Case({"exclude_modules": ["v", "value", "v_proj", "c_proj"]}),
  "layers_to_transform": Case(
    {"target_modules": ["TARGETS"], "layers_to_transform": [1]}
  ),
  "use_rslora": Case({"use_rslora": True}),
  "rank_pattern, alpha_pattern": Case(
    {"rank_pattern": {r".*1\..*": 5}, "alpha_pattern": {r".*0\..*": 3}}
  ),
  "lora_dropout": Case({"lora_dropout": 0.3}),
  "bias=all": Case({"bias": "all"}),
  "bias=lora_only": Case({"bias": "lora_only"}),
  "lora_bias": Case({"lora_bias": True}),
  "use_dora": Case({"use_dora": True}),
  "use_dora, lora_dropout": Case({"use_dora": True, "lora_dropout": 0.3}),
  "embedding a target": Case({"target_modules": ["EMBEDDING", "TARGETS"]}),
  "embedding a target, tied": Case(
    {"target_modules": ["EMBEDDING", "TARGETS"], **_TIES}
  ),
  "head a target": Case({"target_modules": ["HEAD", "TARGETS"]}),
  "both targets": Case({"target_modules": ["EMBEDDING", "HEAD", "TARGETS"]}),
  "embedding saved": Case({"modules_to_save": ["EMBEDDING"]}),
  "head saved": Case({"modules_to_save": ["HEAD"]}),
  "both saved": Case({"modules_to_save": ["EMBEDDING", "HEAD"]}),
  "both saved, tied": Case({"modules_to_save": ["EMBEDDING", "HEAD"], **_TIES}),
  "trainable_token_indices": Case({"trainable_token_indices": _TOKENS}),
  "tokens of the head": Case({"trainable_token_indices": {"HEAD": _TOKENS}}),
  "target_parameters: embedding": Case({"target_parameters": ["EMBEDDING.weight"]}),
  "target_parameters: experts": Case(
    {"target_parameters": ["gate_up_proj", "down_proj"]}
  ),
  "resized": Case(resize=VOCAB + 3),
  "resized, both saved": Case(
    {"modules_to_save": ["EMBEDDING", "HEAD"]}, resize=VOCAB + 3
  ),
  "resized, tokens": Case({"trainable_token_indices": [5, VOCAB]}, resize=VOCAB + 3),
  **{
    f"init={init}": Case({"init_lora_weights": init})
    for init in (True, "gaussian", "orthogonal", "mica", "pissa", "olora")
  },
  "velora_config": Case({"velora_config": {"num_groups": 2}}),
  "monteclora_config": Case({"monteclora_config": {}}),
  "use_qalora": Case({"use_qalora": True, "qalora_group_size": 2}),
  "use_bdlora": Case({"use_bdlora": {"nblocks": 2, "target_modules_bd_a": [""]}}),
  "kasa_config": Case({"kasa_config": {}}),
  "alora_invocation_tokens": Case({"alora_invocation_tokens": [4]}),
  "layer_replication": Case({"layer_replication": [[0, 2], [1, 3]]}),
  "no task_type": Case(task_type=""),
}
_CONFIGS = {"velora_config": "VeloraConfig", "monteclora_config": "MontecloraConfig"}
_CONFIGS |= {"use_bdlora": "BdLoraConfig", "kasa_config": "KasaConfig"}


@dataclass(frozen=True)
class Cell:
  """The outcome of a case in a family: `text` for the table, and why it was refused."""

  text: str
  reason: str | None = None

  @property
  def is_wrong(self) -> bool:
    return self.text.startswith("WRONG")


def measure(peer: Peer, case: Case, base: Path, folder: Path) -> Cell:
  """One case of one family.

  Args:
    base: of the family's model.
    folder: for what the two sides exchange.
  """
  import peft
  import torch

  try:
    model = _base(peer, base, case.resize)
    untouched = _torch(model, peer)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, _config(peer, case, model)).eval()
    with torch.no_grad():
      for _, parameter in sorted(adapted.named_parameters()):
        if parameter.requires_grad:
          parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "theirs")
    again = peft.PeftModel.from_pretrained(
      _base(peer, base, case.resize), folder / "theirs"
    )
    want = _exact(adapted, peer)
    own = _largest(_torch(again.eval(), peer), want)
  except Exception as error:  # PEFT's own: of any kind
    return Cell("–", f"PEFT: {type(error).__name__}: {error}")
  if own > TOLERANCE:
    return Cell("–", "PEFT does not read back what it wrote")
  if _largest(want, untouched) < _NO_EFFECT:
    return Cell("–", "PEFT's adapter has no effect")
  try:
    loaded, saved = with_adapter.load(str(base), folder / "theirs")
    read = _largest(_ours(loaded, saved, peer), want)
  except lx.LoraxError as error:
    return Cell("refused", str(error).replace(str(folder), "DIR"))
  if read > TOLERANCE:
    return Cell(f"WRONG {read:.0e}")
  try:
    hub_peft.write_adapter(
      folder / "ours",
      saved.adapter,
      loaded.keymap,
      saved.config,
      params=loaded.params,
      task_type=saved.task_type,
      dtypes=saved.dtypes or "float32",
    )
  except lx.LoraxError as error:
    return Cell(f"{read:.0e}, not written", str(error).replace(str(folder), "DIR"))
  back = peft.PeftModel.from_pretrained(_base(peer, base, case.resize), folder / "ours")
  written = _largest(_torch(back.eval(), peer), want)
  return Cell(f"{'WRONG ' * (written > TOLERANCE)}{max(read, written):.0e}")


def _base(peer: Peer, folder: Path, resize: int | None) -> Any:
  import torch

  model = peer.load(folder).eval()
  if resize is not None:
    torch.manual_seed(2)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      model.resize_token_embeddings(resize)
  return model


def _config(peer: Peer, case: Case, model: Any) -> Any:
  """PEFT's config: names of the tables and of the family's targets are filled in."""
  import peft
  from peft.tuners.lora import config as configs

  names = {module: name for name, module in model.named_modules()}
  end = lambda module: names[module].rpartition(".")[2] if module is not None else None
  embedding = end(model.get_input_embeddings())
  head = end(model.get_output_embeddings()) or peft_head(model)
  own = peer.lora["target_modules"]
  targets = own if isinstance(own, list) else ["q_proj", "v_proj", "q", "v", "query"]

  def filled(value):
    if isinstance(value, list):
      flat = [targets if each == "TARGETS" else [filled(each)] for each in value]
      return [each for group in flat for each in group]
    if isinstance(value, str):
      return value.replace("EMBEDDING", embedding).replace("HEAD", head)
    return (
      {filled(k): v for k, v in value.items()} if isinstance(value, dict) else value
    )

  fields = {name: filled(value) for name, value in case.fields.items()}
  for name, kind in _CONFIGS.items():
    if name in fields:
      fields[name] = getattr(configs, kind)(**case.fields[name])
  task = peer.task_type if case.task_type is None else case.task_type or None
  given = {"r": 4, "lora_alpha": 7, "task_type": task, **peer.lora, **fields}
  return peft.LoraConfig(**given)


def peft_head(model: Any) -> str:
  """The name of a classifier's module."""
  return next(n for n in ("classifier", "score") if hasattr(model, n))


@functools.cache
def _forward(module: Any) -> Any:
  return jax.jit(lambda params, inputs: module.apply({"params": params}, **inputs))


def _ours(loaded: registry.Loaded, saved: Any, peer: Peer) -> np.ndarray:
  inputs = peer.inputs()
  rest = without_place(loaded.params, saved.adapter)
  merged = lx.merge(
    loaded.params, {k: v for k, v in saved.adapter.items() if k not in rest}
  )
  forward = _forward(loaded.module)
  if rest:
    forward = functools.partial(_applied, forward, rest)
  return np.asarray(forward(merged, inputs))[peer.real(inputs)]


def _applied(forward: Any, rest: Any, params: Any, inputs: Any) -> Any:
  config = lx.LoraConfig(targets=tuple(rest))
  return lx.adapt(forward, config).apply(params, rest, inputs)


def _torch(model: Any, peer: Peer) -> np.ndarray:
  import torch

  inputs = peer.inputs()
  with torch.no_grad():
    return model(**peer.tensors(inputs)).logits.numpy()[peer.real(inputs)]


def _exact(model: Any, peer: Peer) -> np.ndarray:
  """PEFT's logits in float64; in float32 where torch has no such product of experts."""
  want = _torch(model, peer)
  try:
    return _torch(model.double(), peer)
  except RuntimeError:
    return want


def _largest(got: np.ndarray, want: np.ndarray) -> float:
  return float(np.abs(got - want).max() / np.abs(want).max())

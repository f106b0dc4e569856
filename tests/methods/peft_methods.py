"""Methods as PEFT has them: its config, and ours that means the same."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import peft
import torch

import lorax_flax as lx

# Of SHiRA's sparse tensors; torch warns where it is not told.
torch.sparse.check_sparse_tensor_invariants.enable()


@dataclass(frozen=True)
class Peer:
  """One method on small layers.

  Attributes:
    config: PEFT's class.
    theirs: its fields.
    ours: those of LoraConfig.
    formed: whether the change of the kernel is formed.
    starts_at_base: whether the start changes nothing.
    in_bert: its fields that name a BERT's modules.
    method: its name; "" for the peer's.
    kinds: of modules, as the method's keys name them.
  """

  config: type
  theirs: dict[str, Any] = field(default_factory=dict)
  ours: dict[str, Any] = field(default_factory=dict)
  formed: bool = False
  starts_at_base: bool = True
  in_bert: dict[str, Any] = field(default_factory=dict)
  method: str = ""
  kinds: dict[str, str] = field(default_factory=dict)


PEERS = {
  "loha": Peer(peft.LoHaConfig, {"r": 2, "alpha": 6}, {"rank": 2, "alpha": 6}),
  "lokr": Peer(peft.LoKrConfig, {"r": 1, "alpha": 6}, {"rank": 1, "alpha": 6}),
  "vera": Peer(peft.VeraConfig, {"r": 4}, {"rank": 4}),
  "hra": Peer(peft.HRAConfig, {"r": 4}, {"rank": 4}),
  "oft": Peer(peft.OFTConfig, {"oft_block_size": 4}, {"options": {"block_size": 4}}),
  "boft": Peer(peft.BOFTConfig, {"boft_block_size": 4}, {"options": {"block_size": 4}}),
  "miss": Peer(peft.MissConfig, {"r": 5}, {"rank": 5}),
  "hira": Peer(peft.HiraConfig, {"r": 2}, {"rank": 2}, formed=True),
  "c3a": Peer(
    peft.C3AConfig,
    {"block_size": 4, "init_weights": True},
    {"options": {"block_size": 4}},
    formed=True,
  ),
  "fourierft": Peer(
    peft.FourierFTConfig,
    {"n_frequency": 11, "scaling": 9.0, "init_weights": True},
    {"options": {"n_frequency": 11, "scaling": 9.0}},
    formed=True,
  ),
  "gralora": Peer(
    peft.GraloraConfig,
    {"r": 2, "alpha": 6, "gralora_k": 2},
    {"rank": 2, "alpha": 6, "options": {"k": 2}},
  ),
  "shira": Peer(
    peft.ShiraConfig,
    {"r": 2, "random_seed": 3},
    {"rank": 2, "options": {"random_seed": 3}},
    formed=True,
  ),
  "randlora": Peer(
    peft.RandLoraConfig,
    {"r": 3, "randlora_alpha": 6},
    {"rank": 3, "alpha": 6},
  ),
  "vblora": Peer(
    peft.VBLoRAConfig,
    {"r": 3, "num_vectors": 5, "vector_length": 4},
    {"rank": 3, "options": {"num_vectors": 5, "vector_length": 4}},
    starts_at_base=False,
  ),
  "adalora": Peer(
    peft.AdaLoraConfig,
    {"init_r": 2, "lora_alpha": 6, "target_r": 1, "total_step": 9},
    {"rank": 2, "alpha": 6, "options": {"target_r": 1, "total_step": 9}},
  ),
  "delora": Peer(
    peft.DeloraConfig,
    {"r": 2, "delora_lambda": 3},
    {"rank": 2, "options": {"delora_lambda": 3.0}},
  ),
  "deft": Peer(peft.DeftConfig, {"r": 2}, {"rank": 2}),
  "supertuning": Peer(
    peft.SupertuningConfig,
    {"sparsity": 0.9},
    {"options": {"sparsity": 0.9}},
    formed=True,
  ),
  "super of the smallest": Peer(
    peft.SupertuningConfig,
    {"sparsity": 0.7, "select_top": False},
    {"options": {"sparsity": 0.7, "select_top": False}},
    formed=True,
    method="supertuning",
  ),
  "ia3": Peer(peft.IA3Config, {"feedforward_modules": []}),
  "ia3 of inputs": Peer(
    peft.IA3Config,
    {"feedforward_modules": ["target"]},
    {"options": {"feedforward": ("kernel",)}},
    in_bert={"feedforward_modules": ["intermediate.dense"]},
    kinds={"linear": "feedforward linear"},
    method="ia3",
  ),
}


def method(name: str) -> str:
  """The name of a peer's method."""
  return PEERS[name].method or name


def keys(name: str, kind: str) -> dict[str, Any]:
  """The ends of PEFT's keys for a kind of module; none: it has no such module."""
  peer = PEERS[name]
  return lx.METHODS[method(name)].peft.keys.get(peer.kinds.get(kind, kind), {})


def kernel_methods() -> set[str]:
  """The package's own methods of kernels: a test may have registered one."""
  rows = lx.METHODS.items()
  own = {name for name, m in rows if m.__module__.startswith("lorax_flax.")}
  return {name for name in own if issubclass(lx.METHODS[name], lx.KernelDelta)}


def config(name: str, **fields: Any) -> lx.LoraConfig:
  own = PEERS[name].ours
  return lx.LoraConfig(targets="kernel", method=method(name), **own, **fields)


def model(name: str, module: torch.nn.Module, std: float = 0.2) -> torch.nn.Module:
  """A torch layer under PEFT, everything that trains moved off its start."""
  peer = PEERS[name]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # BOFT's CUDA extension is not there
    adapted = peft.get_peft_model(
      module, peer.config(target_modules=["target"], **peer.theirs)
    )
  torch.manual_seed(1)
  with torch.no_grad():
    for parameter in adapted.parameters():
      if parameter.requires_grad:
        parameter.add_(torch.randn_like(parameter) * std)
  return adapted


def leaves(name: str, kind: str, adapted: torch.nn.Module) -> dict[str, Any]:
  """PEFT's trained parameters, by the names of our leaves."""
  found = {}
  for end, (leaf, _) in keys(name, kind).items():
    named = [
      p
      for n, p in adapted.named_parameters()
      if f"{n}.".replace(".default", "").endswith(f".{end}.")
    ]
    if leaf in lx.METHODS[method(name)].trained:
      (found[leaf],) = (p for p in named if p.requires_grad)
  return found


def shared(name: str, adapted: torch.nn.Module) -> dict[str, np.ndarray]:
  """What PEFT's model has once for all targets, by the names of our leaves."""
  found = {}
  for end, (leaf, form) in lx.METHODS[method(name)].peft.shared.items():
    value = getattr(adapted.base_model, end)["default"]
    found[leaf] = np.array(form.to_ours(value.detach().numpy()))
  return found


def ours(name: str, kind: str, values: dict[str, Any]) -> dict[str, np.ndarray]:
  """PEFT's tensors as our leaves."""
  forms, rank = dict(keys(name, kind).values()), PEERS[name].ours.get("rank", 0)
  return {
    leaf: np.array(forms[leaf].of_rank(rank).to_ours(x.detach().numpy()))
    for leaf, x in values.items()
  }

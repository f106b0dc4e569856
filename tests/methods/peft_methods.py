"""Methods as PEFT has them: its config, and ours that means the same."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import peft
import torch

import lorax_flax as lx


@dataclass(frozen=True)
class Peer:
  """One method on small layers.

  Attributes:
    config: PEFT's class.
    theirs: its fields.
    ours: those of LoraConfig.
    formed: whether the change of the kernel is formed.
  """

  config: type
  theirs: dict[str, Any] = field(default_factory=dict)
  ours: dict[str, Any] = field(default_factory=dict)
  formed: bool = False


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
}


def kernel_methods() -> set[str]:
  """The package's own methods of kernels: a test may have registered one."""
  rows = lx.METHODS.items()
  own = {name for name, m in rows if m.__module__.startswith("lorax_flax.")}
  return {name for name in own if issubclass(lx.METHODS[name], lx.KernelDelta)}


def config(name: str, **fields: Any) -> lx.LoraConfig:
  return lx.LoraConfig(targets="kernel", method=name, **PEERS[name].ours, **fields)


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
  method = lx.METHODS[name]
  found = {}
  for end, (leaf, _) in method.peft.keys[kind].items():
    named = [
      p
      for n, p in adapted.named_parameters()
      if f"{n}.".replace(".default", "").endswith(f".{end}.")
    ]
    (found[leaf],) = (p for p in named if p.requires_grad)
  return found


def ours(name: str, kind: str, values: dict[str, Any]) -> dict[str, np.ndarray]:
  """PEFT's tensors as our leaves."""
  forms = dict(lx.METHODS[name].peft.keys[kind].values())
  return {
    leaf: np.array(forms[leaf].to_ours(x.detach().numpy()))
    for leaf, x in values.items()
  }

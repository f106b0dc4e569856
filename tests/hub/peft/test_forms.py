"""Every kind of module that PEFT adapts, and every method, on one small network."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from lorax_flax.hub.checkpoints.entries import (
  CONV_2D,
  EXPERTS,
  Entry,
  embedding,
  linear,
  norm,
)
from lorax_flax.hub.checkpoints.keymap import KeyMap
from tests.hub.peft import peers

LAYERS, NUM_EXPERTS = 3, 4


class Experts(torch.nn.Module):
  """Stacked as transformers stacks them: (expert, out, in)."""

  def __init__(self):
    super().__init__()
    self.gate_up_proj = torch.nn.Parameter(torch.randn(NUM_EXPERTS, 14, 6))
    self.down_proj = torch.nn.Parameter(torch.randn(NUM_EXPERTS, 6, 7))

  def forward(self, x):
    gate, up = torch.einsum("bd,efd->bef", x, self.gate_up_proj).chunk(2, dim=-1)
    return torch.einsum("bef,edf->bd", torch.tanh(gate) * up, self.down_proj)


class Block(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.norm = torch.nn.LayerNorm(6)
    self.mix = torch.nn.Linear(6, 6)
    self.c_fc = Conv1D(8, 6)
    self.out = torch.nn.Linear(8, 6, bias=False)
    self.experts = Experts()

  def forward(self, x):
    x = x + self.out(torch.tanh(self.c_fc(self.mix(self.norm(x)))))
    return x + 0.1 * self.experts(x)


class Net(torch.nn.Module):
  """Pixels and words to scores, as no model has them together."""

  def __init__(self):
    super().__init__()
    self.patch = torch.nn.Conv2d(3, 6, (2, 3), stride=2)
    self.point = torch.nn.Conv2d(6, 6, 1)
    self.words = torch.nn.Embedding(11, 6)
    self.h = torch.nn.ModuleList(Block() for _ in range(LAYERS))
    self.head = torch.nn.Linear(6, 5)

  def get_input_embeddings(self):
    return self.words

  def forward(self, pixels, ids):
    x = torch.tanh(self.point(self.patch(pixels))).mean((2, 3)) + self.words(ids)
    for block in self.h:
      x = block(x)
    return self.head(x)


def keymap(scan=False):
  layer, key = "layer_{i}", "h.{i}"
  conv = lambda name: (
    Entry(f"{name}/kernel", f"{name}.weight", CONV_2D),
    Entry(f"{name}/bias", f"{name}.bias"),
  )
  return KeyMap(
    family="net",
    prefix="",
    entries=(
      *conv("patch"),
      *conv("point"),
      embedding("words", "words"),
      *norm(f"{layer}/norm", f"{key}.norm"),
      *linear(f"{layer}/mix", f"{key}.mix"),
      Entry(f"{layer}/c_fc/kernel", f"{key}.c_fc.weight"),
      Entry(f"{layer}/c_fc/bias", f"{key}.c_fc.bias"),
      *linear(f"{layer}/out", f"{key}.out", bias=False),
      Entry(f"{layer}/gate_up/kernel", f"{key}.experts.gate_up_proj", EXPERTS),
      Entry(f"{layer}/down/kernel", f"{key}.experts.down_proj", EXPERTS),
      *linear("head", "head", part="head"),
    ),
    counts={"i": LAYERS},
    scan=scan,
    anchor="words.weight",
  )


@pytest.fixture(scope="module")
def net():
  torch.manual_seed(3)
  return peers.randomised(Net())


def forward(model):
  generator = torch.Generator().manual_seed(5)
  pixels = torch.randn(4, 3, 4, 6, generator=generator)
  return model(pixels, torch.tensor([1, 7, 7, 10]))


CASES = {
  "conv": {"target_modules": ["patch"]},
  "conv 1 x 1": {"target_modules": ["point"], "r": 3},
  "conv1d": {"target_modules": ["c_fc"], "fan_in_fan_out": True, "r": 5},
  "conv1d and linear": {"target_modules": ["c_fc", "mix"]},
  "all kinds": {"target_modules": ["patch", "point", "words", "c_fc", "out", "head"]},
  "dora": {
    "target_modules": ["patch", "point", "words", "c_fc", "mix"],
    "use_dora": True,
    "rank_pattern": {r"1\.mix": 2},
  },
  "dora in some layers": {
    "target_modules": ["mix"],
    "use_dora": True,
    "layers_to_transform": [0, 2],
    "layers_pattern": "h",
  },
  "lora_bias": {
    "target_modules": ["patch", "c_fc", "mix", "head"],
    "lora_bias": True,
    "alpha_pattern": {r"h\.2\.mix": 3},
  },
  "biases of all kinds": {"target_modules": ["patch", "c_fc"], "bias": "all"},
  "biases of targets": {
    "target_modules": ["patch", "c_fc"],
    "bias": "lora_only",
    "lora_bias": True,
  },
  "a convolution saved": {"target_modules": ["mix"], "modules_to_save": ["patch"]},
  "conv1d saved": {"target_modules": ["mix"], "modules_to_save": ["c_fc", "h.1.norm"]},
  "tokens": {
    "target_modules": ["mix"],
    "trainable_token_indices": {"words": [7, 0, 10]},
  },
  "experts": {
    "target_modules": ["mix"],
    "target_parameters": ["experts.gate_up_proj", "down_proj"],
    "rank_pattern": {r"h\.1\.experts\.down_proj": 3, "gate_up_proj": 2},
    "alpha_pattern": {"down_proj": 6},
    "use_rslora": True,
  },
  "experts alone": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
  "a linear layer's parameter": {
    "target_modules": [],
    "target_parameters": ["h.1.mix.weight", "out.weight"],
    "bias": "all",
  },
}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_peft_merges_to_what_peft_merges_and_comes_back(
  net, case, scan, tmp_path
):
  peers.check(net, keymap(scan), tmp_path, forward, **CASES[case])

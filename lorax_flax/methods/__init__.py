"""Methods: a small pytree node each, which declares its leaves and describes itself.

`METHODS` is the table of them. A new method is one file with a subclass of
`KernelDelta` (or `LowRank`), and one row here; a user's own is registered in the same
way: `METHODS["mine"] = Mine`.
"""

from lorax_flax.methods.adalora import AdaLoRA
from lorax_flax.methods.boft import BOFT
from lorax_flax.methods.c3a import C3A
from lorax_flax.methods.corda import CorDA
from lorax_flax.methods.deft import DEFT
from lorax_flax.methods.delora import DeLoRA
from lorax_flax.methods.delta import Delta
from lorax_flax.methods.dora import DoRA
from lorax_flax.methods.fourier_ft import FourierFT
from lorax_flax.methods.full import Tuned
from lorax_flax.methods.fused_lora import FusedLoRA
from lorax_flax.methods.gralora import GraLoRA
from lorax_flax.methods.hira import HiRA
from lorax_flax.methods.hra import HRA
from lorax_flax.methods.ia3 import IA3
from lorax_flax.methods.kernel_delta import Followed, KernelDelta
from lorax_flax.methods.loha import LoHa
from lorax_flax.methods.lokr import LoKr
from lorax_flax.methods.lora import LoRA
from lorax_flax.methods.lora_bias import BiasLoRA
from lorax_flax.methods.lora_ga import LoRAGA
from lorax_flax.methods.low_rank import LowRank
from lorax_flax.methods.miss import MiSS
from lorax_flax.methods.oft import OFT
from lorax_flax.methods.olora import OLoRA
from lorax_flax.methods.parts import Parts
from lorax_flax.methods.pissa import PiSSA
from lorax_flax.methods.randlora import RandLoRA
from lorax_flax.methods.shira import SHiRA
from lorax_flax.methods.supertuning import SuperTuning
from lorax_flax.methods.table import Methods
from lorax_flax.methods.token_rows import Rows
from lorax_flax.methods.vblora import VBLoRA
from lorax_flax.methods.vera import VeRA

Adapter = dict[str, Delta]

METHODS = Methods(
  lora=LoRA,
  dora=DoRA,
  lora_bias=BiasLoRA,
  fused_lora=FusedLoRA,
  pissa=PiSSA,
  olora=OLoRA,
  lora_ga=LoRAGA,
  corda=CorDA,
  adalora=AdaLoRA,
  loha=LoHa,
  lokr=LoKr,
  vera=VeRA,
  hra=HRA,
  oft=OFT,
  boft=BOFT,
  miss=MiSS,
  hira=HiRA,
  c3a=C3A,
  fourierft=FourierFT,
  gralora=GraLoRA,
  ia3=IA3,
  shira=SHiRA,
  randlora=RandLoRA,
  vblora=VBLoRA,
  delora=DeLoRA,
  deft=DEFT,
  supertuning=SuperTuning,
  token_rows=Rows,
  full=Tuned,
)

__all__ = [
  "METHODS",
  "Adapter",
  "BiasLoRA",
  "Delta",
  "DoRA",
  "Followed",
  "FusedLoRA",
  "KernelDelta",
  "LoRA",
  "LowRank",
  "Parts",
  "Rows",
  "Tuned",
]

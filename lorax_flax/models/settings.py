"""Settings of the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorax_flax.errors import LoraxError, check_known
from lorax_flax.models.remat import REMAT
from lorax_flax.quant import CHOICES

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class ModelSettings:
  """Choice of model, and how it computes.

  Attributes:
    path: a folder, a name on the hub or an alias.
    hf_config: content of its config.json, so that the step can be compiled without the
      model; a config.json that differs is an error. None where that is unknown.
    dtype: dtype of computing; weights that train are float32.
    param_dtype: dtype of frozen weights in memory; None leaves each as it is stored.
    quant: format of the frozen kernels of the layers in memory: "int8", "int4", "nf4",
      "nf4_single", "fp8", "q8_0", "q4_0", "q4_1", or "as_stored" in a GGUF file;
      None: they are not quantised.
    scan: whether the layers are stacked and scanned: compiles faster, runs slower on a
      CPU.
    remat: what the backward pass recomputes: "none"; "inputs": no product with a
      kernel; "attention": the products into the feed-forward part too;
      "offload_attention": all but attention, which is in the host's memory, as are the
      layers' inputs; "full": all; "offload": all, with the layers' inputs in the host's
      memory. Each needs less memory than the one before.
    untie: whether each use of a tied table gets a weight of its own.
    vocab_size: number of tokens, where the model is to have more or fewer than the
      checkpoint; None takes the checkpoint's.
    dropout: rate in the encoder; None takes the checkpoint's.
    head_dropout: rate before the classifier; None takes the checkpoint's.
  """

  path: str
  hf_config: Mapping[str, Any] | None = None
  dtype: str = "float32"
  param_dtype: str | None = None
  quant: str | None = None
  scan: bool = False
  remat: str = "none"
  untie: bool = False
  vocab_size: int | None = None
  dropout: float | None = None
  head_dropout: float | None = None

  def __post_init__(self):
    check_known("model.dtype", self.dtype, DTYPES)
    if self.param_dtype is not None:
      check_known("model.param_dtype", self.param_dtype, DTYPES)
    if self.quant is not None:
      check_known("model.quant", self.quant, CHOICES)
    if self.vocab_size is not None and self.vocab_size < 1:
      raise LoraxError(f"model.vocab_size is {self.vocab_size}, not 1 or more")
    check_known("model.remat", self.remat, REMAT)

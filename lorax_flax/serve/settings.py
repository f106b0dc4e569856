"""Settings of decoding, checked where they are made."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from lorax_flax.errors import LoraxError, check_known

# Settings that only sampling reads, and those that only beams read.
_OF_SAMPLING = ("top_k", "top_p", "min_p", "seed")
_OF_BEAMS = ("length_penalty", "early_stopping")
_EARLY = ("False", "True", "never")
_SEEDS = 2**32


@dataclass(frozen=True)
class Decoding:
  """Settings of decoding, under transformers' names where it has them.

  Attributes:
    max_new_tokens: largest number of tokens that a text gets.
    min_new_tokens: number of tokens before which no text ends.
    temperature: what logits are divided by before sampling; 0 takes the most probable
      token.
    top_k: number of the most probable tokens that are sampled from; 0 for all.
    top_p: smallest total probability of the most probable tokens that are sampled from.
    min_p: smallest probability of a token that is sampled, as a share of the most
      probable one's.
    seed: seed of sampling.
    repetition_penalty: what the logits of tokens that were there before, in the prompt
      or after it, are divided by, or multiplied with where negative.
    no_repeat_ngram: length of n-grams that occur only once in a text; 0 for no limit.
    beams: number of beams; 1 is no beam search.
    length_penalty: exponent of the length that a beam's log probability is divided by.
    early_stopping: True: a search ends with as many finished beams as there are beams;
      False: where the best running beam, at its present length, scores less than
      these; "never": where it does at whichever length is best for it.
    stop: texts that end a text and are cut off it.
  """

  max_new_tokens: int = 128
  min_new_tokens: int = 0
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  seed: int = 0
  repetition_penalty: float = 1.0
  no_repeat_ngram: int = 0
  beams: int = 1
  length_penalty: float = 1.0
  early_stopping: bool | Literal["never"] = False
  stop: tuple[str, ...] = ()

  def __post_init__(self):
    for name, least in (
      ("max_new_tokens", 1),
      ("min_new_tokens", 0),
      ("top_k", 0),
      ("seed", 0),
      ("no_repeat_ngram", 0),
      ("beams", 1),
    ):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise LoraxError(f"{name} is {value!r}, and must be an integer from {least} up")
    for name, lowest, highest in (
      ("temperature", 0.0, math.inf),
      ("top_p", 0.0, 1.0),
      ("min_p", 0.0, 1.0),
      ("repetition_penalty", 0.0, math.inf),
      ("length_penalty", -math.inf, math.inf),
    ):
      value = getattr(self, name)
      number = isinstance(value, int | float) and not isinstance(value, bool)
      if not number or not math.isfinite(value) or not lowest <= value <= highest:
        raise LoraxError(
          f"{name} is {value!r}, and must be from {lowest:g} to {highest:g}"
        )
    if self.repetition_penalty == 0 or self.top_p == 0:
      name = "top_p" if self.top_p == 0 else "repetition_penalty"
      raise LoraxError(f"{name} is 0, and must be more")
    if self.seed >= _SEEDS:
      raise LoraxError(f"seed is {self.seed}, and must be less than {_SEEDS}")
    check_known("early_stopping", str(self.early_stopping), _EARLY)
    if self.min_new_tokens > self.max_new_tokens:
      raise LoraxError(
        f"min_new_tokens is {self.min_new_tokens}, and max_new_tokens is less: "
        f"{self.max_new_tokens}"
      )
    if not isinstance(self.stop, tuple) or not all(
      isinstance(text, str) and text for text in self.stop
    ):
      raise LoraxError(f"stop is {self.stop!r}, and must hold texts that are not empty")
    self._check_read()

  def _check_read(self) -> None:
    """Refuses what nothing would read."""
    if self.temperature and self.beams > 1:
      raise LoraxError(
        f"beams={self.beams} and temperature={self.temperature:g}: either search "
        "(temperature=0) or sample (beams=1)"
      )
    if self.stop and self.beams > 1:
      raise LoraxError(f"beams={self.beams} and stop: beams end at ends of texts alone")
    defaults = {field.name: field.default for field in dataclasses.fields(self)}
    for names, read, needed in (
      (_OF_SAMPLING, self.temperature > 0, "temperature is 0: nothing is sampled"),
      (_OF_BEAMS, self.beams > 1, "beams is 1: there is no search"),
    ):
      given = [name for name in names if getattr(self, name) != defaults[name]]
      if given and not read:
        raise LoraxError(f"{given[0]}={getattr(self, given[0])} does nothing: {needed}")

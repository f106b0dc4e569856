"""Prompts that are answered while a language model trains, to see what it learns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorax_flax.methods import Adapter


@dataclass(frozen=True)
class Samples:
  """Fixed prompts, answered before the first step and at each evaluation.

  Attributes:
    prompts: texts.
    expected: what follows each in the data.
    answer: (params, adapter) -> the model's text after each; it changes neither.
  """

  prompts: Sequence[str]
  expected: Sequence[str]
  answer: Callable[[Any, Adapter], Sequence[str]]

  def lines(self, step: int, answers: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of samples.jsonl about a step."""
    return [
      {"step": step, "prompt": prompt, "expected": expected, "answer": answer}
      for prompt, expected, answer in zip(
        self.prompts, self.expected, answers, strict=True
      )
    ]

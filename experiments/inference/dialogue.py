"""A chat between a person and a model, answer by answer."""

import dataclasses
from collections.abc import Generator
from pathlib import Path

from experiments.inference import prompts
from lorax_flax.data import chat
from lorax_flax.errors import LoraxError
from lorax_flax.serve import generate as generation
from lorax_flax.serve.conversation import Conversation
from lorax_flax.serve.generate import Writer
from lorax_flax.serve.settings import Decoding


class Dialogue:
  """A chat so far; what was read of it is not read again.

  Answers are those of `experiments.generate` to the same messages.
  """

  def __init__(
    self,
    writer: Writer,
    folder: Path,
    decoding: Decoding,
    *,
    system: str | None = None,
    chat_template: str | None = None,
  ):
    """Starts a chat without a question.

    Args:
      folder: of the tokenizer and the chat template.
      system: content of a first message of the role system.
      chat_template: a .jinja file in place of the folder's template.

    Raises:
      LoraxError: no tokenizer, no template, beams, or a model with an encoder.
    """
    if writer.tokenizer is None:
      raise LoraxError(f"there is no tokenizer in {folder}")
    if generation.has_encoder(writer.model):
      name = writer.model.hf_config["model_type"]
      raise LoraxError(
        f"a {name} reads each prompt with its encoder, and keeps no chat: "
        "`lorax generate` takes its prompts"
      )
    if decoding.beams > 1:
      raise LoraxError(f"beams={decoding.beams}: a search has no text before its end")
    try:
      self._template = chat.of_model(folder, chat_template)
    except LoraxError as error:
      flag = "--chat_template=FILE.jinja takes the place of the model's own"
      raise LoraxError(f"{error}. {flag}") from error
    self._writer, self._tokenizer, self._decoding = writer, writer.tokenizer, decoding
    self._first = [] if system is None else [{"role": "system", "content": system}]
    self._conversation = Conversation(writer)
    self.reset()

  def reset(self) -> None:
    """Forgets all but the system's message."""
    self._messages = list(self._first)

  @property
  def full(self) -> bool:
    """True where the model has no room for another token."""
    return self._conversation.tokens >= self._writer.model.max_length

  def ask(self, text: str) -> Generator[str, None, None]:
    """Pieces of the answer, after each token; it may be ended after any of them.

    The question and what was said of its answer become a part of the chat.

    Raises:
      LoraxError: a text that is no Unicode, a chat that the template refuses or that
        the model has no room for, or logits that are not finite: the chat then stays
        as it was.
    """
    asked = [*self._messages, {"role": "user", "content": text}]
    made = chat.check({"messages": asked})
    ids = prompts.of_chat(made, self._tokenizer, self._template)
    most = self._writer.model.max_length
    if len(ids) >= most:
      raise LoraxError(
        f"the chat has {len(ids):,} tokens, and the model takes {most:,} with the "
        "answer: /reset begins a new one"
      )
    new = min(self._decoding.max_new_tokens, most - len(ids))
    least = min(self._decoding.min_new_tokens, new)
    decoding = dataclasses.replace(
      self._decoding, max_new_tokens=new, min_new_tokens=least
    )
    said = ""
    try:
      for piece in self._conversation.answer(ids, decoding):
        said += piece
        yield piece
    except GeneratorExit:
      if not said:
        raise
      self._add(asked, said)
      raise
    self._add(asked, said)

  def _add(self, asked: list[dict[str, str]], said: str) -> None:
    self._messages = [*asked, {"role": "assistant", "content": said}]

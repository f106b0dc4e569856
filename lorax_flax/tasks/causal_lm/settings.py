"""Settings of a language model's own data."""

from dataclasses import dataclass

from lorax_flax.errors import check_known
from lorax_flax.tasks.answers import AnswerSettings


@dataclass(frozen=True)
class TextSettings(AnswerSettings):
  """Settings of a language model's own data.

  Columns of its files: messages (chats); prompt and completion; text (documents); or
  input_ids and, where not all are learnt, loss_mask.

  Attributes:
    documents: "windows" cuts texts one after another into rows of max_length tokens;
      "rows" has one row for each text.
    chat_template: a .jinja file in place of the model's own template.
    learn: "all" assistant turns of a chat, or the "last".
    packing: puts several rows to train on into one of up to max_length tokens; each
      attends to itself alone.
  """

  documents: str = "windows"
  chat_template: str | None = None
  learn: str = "all"
  packing: bool = False

  def __post_init__(self):
    super().__post_init__()
    for name, known in _CHOICES.items():
      check_known(f"data.{name}", getattr(self, name), known)


_CHOICES = {
  "documents": ("windows", "rows"),
  "learn": ("all", "last"),
}

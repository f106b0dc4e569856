"""Chat templates, and what the model learns of a chat.

`template(folder)` loads a model's template, `render` makes a chat's text with it, and
`encode` its token ids with the mask of those that are learnt.
"""

from lorax_flax.data.chat.encoding import encode, encode_all, tokenize
from lorax_flax.data.chat.files import of_model, special_tokens, template
from lorax_flax.data.chat.masks import Marked, Markers, mark, markers
from lorax_flax.data.chat.messages import Chat, check, split
from lorax_flax.data.chat.templates import ChatTemplate, render

__all__ = [
  "Chat",
  "ChatTemplate",
  "Marked",
  "Markers",
  "check",
  "encode",
  "encode_all",
  "mark",
  "markers",
  "of_model",
  "render",
  "special_tokens",
  "split",
  "template",
  "tokenize",
]

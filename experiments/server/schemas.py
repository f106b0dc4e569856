"""Schemas of requests, checked before anything is done for them."""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import pydantic
from pydantic import ConfigDict, Field

from experiments.server.failures import Refused
from lorax_flax.errors import LoraxError, unknown
from lorax_flax.files import strict_json
from lorax_flax.serve.settings import Decoding

# Fields of OpenAI's that are not built here, and the values which ask for nothing.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
  "audio": (),
  "best_of": (1,),
  "echo": (False,),
  "frequency_penalty": (0,),
  "function_call": (),
  "functions": (),
  "logit_bias": ({},),
  "logprobs": (False, 0),
  "modalities": (["text"],),
  "parallel_tool_calls": (True,),
  "prediction": (),
  "presence_penalty": (0,),
  "reasoning_effort": (),
  "response_format": ({"type": "text"},),
  "service_tier": ("auto", "default"),
  "store": (False,),
  "suffix": ("",),
  "top_logprobs": (0,),
  "web_search_options": (),
}
_LEAST_TEMPERATURE = 0.01

Strings = str | list[str]


class Body(pydantic.BaseModel):
  """An object of known names and types."""

  model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
  """Options of a stream."""

  include_usage: bool = False


class Generation(Body):
  """Settings of a text, under OpenAI's names; the second group is vLLM's."""

  model: str
  temperature: float = Field(1.0, ge=0, le=2)
  top_p: float = Field(1.0, gt=0, le=1)
  seed: int | None = Field(None, ge=0, lt=2**32)
  stop: Strings = Field(default_factory=list)
  n: int = Field(1, ge=1, le=16)
  stream: bool = False
  stream_options: StreamOptions | None = None
  user: str | None = None
  metadata: dict[str, Any] | None = None

  top_k: int = Field(0, ge=-1)
  min_p: float = Field(0.0, ge=0, le=1)
  repetition_penalty: float = Field(1.0, gt=0, le=10)

  def decoding(self, max_new_tokens: int, seed: int) -> Decoding:
    """Settings of decoding; a greedy text leaves out what only sampling reads.

    Args:
      max_new_tokens: largest number of tokens.
      seed: where the request has none.
    """
    if 0 < self.temperature < _LEAST_TEMPERATURE:
      raise LoraxError(
        f"temperature: {self.temperature:g} is neither 0, for the most probable tokens,"
        f" nor at least {_LEAST_TEMPERATURE:g}"
      )
    stop = [self.stop] if isinstance(self.stop, str) else self.stop
    if len(stop) > 16 or not all(stop):
      raise LoraxError("stop: up to 16 texts, none of them empty")
    sampling: dict[str, Any] = {
      "top_p": self.top_p,
      "top_k": max(self.top_k, 0),
      "min_p": self.min_p,
      "seed": seed if self.seed is None else self.seed,
    }
    return Decoding(
      max_new_tokens=max_new_tokens,
      temperature=self.temperature,
      repetition_penalty=self.repetition_penalty,
      stop=tuple(stop),
      **(sampling if self.temperature else {}),
    )


class Completion(Generation):
  """Texts after prompts: a text, or token ids, or several of either."""

  prompt: str | list[str] | list[int] | list[list[int]]
  max_tokens: int = Field(16, ge=1)


class Chat(Generation):
  """The answer in a chat."""

  messages: list[dict[str, Any]] = Field(min_length=1)
  max_tokens: int | None = Field(None, ge=1)
  max_completion_tokens: int | None = Field(None, ge=1)
  tools: list[dict[str, Any]] | None = None
  tool_choice: Literal["auto", "none"] = "auto"
  chat_template_kwargs: dict[str, Any] | None = None


class Classify(Body):
  """Texts whose labels are asked for, as of vLLM's."""

  model: str
  input: Strings
  user: str | None = None


class Embeddings(Body):
  """Texts whose vectors are asked for."""

  model: str
  input: str | list[str] | list[int] | list[list[int]]
  encoding_format: Literal["float", "base64"] = "float"
  user: str | None = None


class LoadAdapter(Body):
  """An adapter to serve, as of vLLM's; without a path, the folder of its name."""

  lora_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@/+-]{0,199}$")
  lora_path: str | None = None


class UnloadAdapter(Body):
  """An adapter to forget, as of vLLM's."""

  lora_name: str


_Body = TypeVar("_Body", bound=Body)


def read(schema: type[_Body], text: bytes) -> _Body:
  """The content of a request.

  Raises:
    Refused: no JSON object, a field that is unknown or not built here, or a value of
      another type; one message names the field.
  """
  try:
    found = strict_json.parse(text)
  except ValueError as error:
    raise Refused(400, f"the request is no JSON: {error}") from error
  if not isinstance(found, dict):
    raise Refused(400, f"the request is no JSON object: {found!r:.80}")
  # Clients write null for what they leave out.
  fields = {name: value for name, value in found.items() if value is not None}
  for name in [name for name in fields if name not in schema.model_fields]:
    neutral = _UNSUPPORTED.get(name)
    if neutral is None:
      raise Refused(400, unknown("field", name, schema.model_fields))
    if fields.pop(name) not in neutral:
      raise Refused(400, f"the field {name!r} is not supported here")
  try:
    return schema.model_validate(fields)
  except pydantic.ValidationError as error:
    raise Refused(400, _message(error)) from error


def _message(error: pydantic.ValidationError) -> str:
  """One message: of a field of several types, what each of them takes."""
  errors = error.errors(include_url=False, include_context=False)
  name = errors[0]["loc"][0]
  messages = dict.fromkeys(e["msg"] for e in errors if e["loc"][0] == name)
  return f"{name}: {'; or '.join(list(messages)[:4])}; found {errors[0]['input']!r:.80}"

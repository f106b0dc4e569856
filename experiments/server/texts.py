"""Completions and chats: the routes, in one answer or as a stream of events."""

import asyncio
import base64
import functools
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from experiments.server import bodies, failures, schemas, tool_calls
from experiments.server.answers import Answers
from experiments.server.failures import Refused
from experiments.server.language import Language
from experiments.server.meters import Meters
from experiments.server.tool_calls import Found, Plain, joined
from experiments.server.voice import Voice
from lorax_flax.errors import LoraxError
from lorax_flax.serve.request import Piece

_MOST_TEXTS = 1024


@dataclass(frozen=True)
class _Form:
  """The form of an answer.

  Attributes:
    prefix: of its id.
    whole, chunk: names of an answer and of a part of one.
    is_chat: it has messages, and not texts.
  """

  prefix: str
  whole: str
  chunk: str
  is_chat: bool

  def choice(self, index: int, found: Found, finish: str | None) -> dict[str, Any]:
    """A full text."""
    text, calls = found.text, [call.of_openai() for call in found.calls]
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
      message |= {"content": text or None, "tool_calls": calls}
    own = {"message": message} if self.is_chat else {"text": text}
    return {"index": index, **own, "logprobs": None, "finish_reason": finish}

  def part(self, part: "_Part") -> dict[str, Any]:
    """A piece of a text."""
    text, calls = part.found
    delta: dict[str, Any] = {"content": text} if text else {}
    if calls:
      numbered = enumerate(calls, start=part.calls_before)
      delta["tool_calls"] = [{"index": i, **call.of_openai()} for i, call in numbered]
    own = {"delta": delta} if self.is_chat else {"text": text}
    return {"index": part.choice, **own, "logprobs": None, "finish_reason": part.finish}

  def opening(self, index: int) -> dict[str, Any]:
    """The part before the pieces of a message."""
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


class _Part(NamedTuple):
  """Text and calls that one token brings.

  Attributes:
    choice: its number.
    found: text and calls of tools.
    calls_before: number of those that the choice had before.
    finish: why it is the last; None where it is not.
  """

  choice: int
  found: Found
  calls_before: int
  finish: str | None


_TEXT = _Form("cmpl", "text_completion", "text_completion", is_chat=False)
_CHAT = _Form("chatcmpl", "chat.completion", "chat.completion.chunk", is_chat=True)


class Texts:
  """Routes of a language model."""

  def __init__(self, language: Language, meters: Meters):
    self._language, self._meters = language, meters

  async def completions(self, request: Request) -> Response:
    """POST /v1/completions."""
    asked = schemas.read(schemas.Completion, await bodies.read(request))
    voice = self._voice(asked.model)
    prompts = await asyncio.to_thread(_prompts, voice, asked.prompt)
    return await self._answer(request, asked, prompts, asked.max_tokens, _TEXT, Plain)

  async def chat(self, request: Request) -> Response:
    """POST /v1/chat/completions."""
    asked = schemas.read(schemas.Chat, await bodies.read(request))
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
      raise Refused(400, "max_tokens and max_completion_tokens: give one of them")
    voice = self._voice(asked.model)
    tools = None if asked.tool_choice == "none" else asked.tools
    prompt = await asyncio.to_thread(
      voice.of_chat, asked.messages, tools, asked.chat_template_kwargs
    )
    make: Callable[[], Plain] = Plain
    if tools:
      form = await asyncio.to_thread(voice.call_form, asked.messages, tools)
      make = functools.partial(tool_calls.reader, form)
    room = self._language.engine.length - len(prompt)
    most = asked.max_completion_tokens or asked.max_tokens or max(room, 1)
    return await self._answer(request, asked, [prompt], most, _CHAT, make)

  async def embeddings(self, request: Request) -> Response:
    """POST /v1/embeddings."""
    asked = schemas.read(schemas.Embeddings, await bodies.read(request))
    voice = self._voice(asked.model)
    prompts = await asyncio.to_thread(_prompts, voice, asked.input)
    if len(prompts) > _MOST_TEXTS:
      raise Refused(
        400, f"input: {len(prompts)} texts; at most {_MOST_TEXTS} are taken"
      )
    found_NxD = await asyncio.to_thread(self._language.embed, asked.model, prompts)
    in_base64 = asked.encoding_format == "base64"
    data = [
      {
        "object": "embedding",
        "index": index,
        "embedding": _base64(x_D) if in_base64 else x_D.tolist(),
      }
      for index, x_D in enumerate(found_NxD)
    ]
    tokens = sum(map(len, prompts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    content = {"object": "list", "model": asked.model, "data": data, "usage": usage}
    return JSONResponse(content)

  def _voice(self, model: str) -> Voice:
    try:
      return self._language.voice(model)
    except LoraxError as error:
      raise Refused(404, str(error)) from error

  async def _answer(
    self,
    request: Request,
    asked: schemas.Generation,
    prompts: Sequence[Sequence[int]],
    most: int,
    form: _Form,
    reader: Callable[[], Plain],
  ) -> Response:
    if asked.stream_options is not None and not asked.stream:
      raise Refused(400, "stream_options: the request asks for no stream")
    decoding = asked.decoding(most, secrets.randbits(32))
    answers = Answers(self._language, asked.model, prompts, decoding, asked.n)
    metered = self._meters.metered(asked.model, answers)
    parts = _parts(metered, [reader() for _ in range(len(answers))])
    head = {
      "id": f"{form.prefix}-{secrets.token_hex(12)}",
      "created": int(time.time()),
      "model": asked.model,
    }
    if asked.stream:
      events = _events(head, form, answers, parts, asked.stream_options)
      return StreamingResponse(events, media_type="text/event-stream")
    collected = asyncio.ensure_future(_collected(parts, len(answers), form))
    left = asyncio.ensure_future(bodies.gone(request))
    await asyncio.wait({collected, left}, return_when=asyncio.FIRST_COMPLETED)
    left.cancel()
    if not collected.done():
      collected.cancel()
      answers.cancel()
      return Response(status_code=499)
    content = {**head, "object": form.whole, "choices": collected.result()}
    return JSONResponse({**content, "usage": _usage(answers)})


def _prompts(voice: Voice, prompt: Any) -> list[list[int]]:
  """Token ids of each prompt of a request."""
  if isinstance(prompt, str):
    return [voice.of_text(prompt)]
  if not prompt:
    raise LoraxError("the prompt is empty")
  if isinstance(prompt[0], int):
    return [voice.of_ids(prompt)]
  one = voice.of_text if isinstance(prompt[0], str) else voice.of_ids
  return [one(each) for each in prompt]


async def _parts(
  pieces: AsyncIterator[tuple[int, Piece]], readers: Sequence[Plain]
) -> AsyncIterator[_Part]:
  """The pieces with the calls of tools in them, by a reader for each choice."""
  counts = [0] * len(readers)
  async for index, piece in pieces:
    found = readers[index].push(piece.text)
    if piece.finish:
      found = joined([found, readers[index].finish()])
    before, finish = counts[index], piece.finish
    counts[index] += len(found.calls)
    called = finish == "stop" and counts[index] > 0
    yield _Part(index, found, before, "tool_calls" if called else finish)


async def _collected(
  parts: AsyncIterator[_Part], choices: int, form: _Form
) -> list[dict[str, Any]]:
  texts: list[list[Found]] = [[] for _ in range(choices)]
  finishes: list[str | None] = [None] * choices
  async for part in parts:
    texts[part.choice].append(part.found)
    finishes[part.choice] = part.finish
  return [
    form.choice(index, joined(found), finish)
    for index, (found, finish) in enumerate(zip(texts, finishes, strict=True))
  ]


async def _events(
  head: dict[str, Any],
  form: _Form,
  answers: Answers,
  parts: AsyncIterator[_Part],
  options: schemas.StreamOptions | None,
) -> AsyncIterator[str]:
  """Server-sent events of a text as it is written."""
  head = {**head, "object": form.chunk}
  with_usage = options is not None and options.include_usage
  own = {"usage": None} if with_usage else {}
  try:
    if form.is_chat:
      for index in range(len(answers)):
        yield _event({**head, "choices": [form.opening(index)], **own})
    async for part in parts:
      if any(part.found) or part.finish:
        yield _event({**head, "choices": [form.part(part)], **own})
    if with_usage:
      yield _event({**head, "choices": [], "usage": _usage(answers)})
  except LoraxError as error:
    yield _event(failures.body(failures.status(error), str(error)))
  finally:
    answers.cancel()
  yield "data: [DONE]\n\n"


def _event(content: Any) -> str:
  return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _base64(x_D: np.ndarray) -> str:
  """The vector as OpenAI's clients ask for it."""
  return base64.b64encode(x_D.astype("<f4").tobytes()).decode()


def _usage(answers: Answers) -> dict[str, int]:
  return {
    "prompt_tokens": answers.prompt_tokens,
    "completion_tokens": answers.tokens,
    "total_tokens": answers.prompt_tokens + answers.tokens,
  }

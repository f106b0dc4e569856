"""Completions and chats: the routes, in one answer or as a stream of events."""

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from experiments.server import bodies, failures, schemas
from experiments.server.answers import Answers
from experiments.server.failures import Refused
from experiments.server.language import Language
from experiments.server.meters import Meters
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

  def choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
    """A full text."""
    message = {"role": "assistant", "content": text, "refusal": None}
    own = {"message": message} if self.is_chat else {"text": text}
    return {"index": index, **own, "logprobs": None, "finish_reason": finish}

  def part(self, index: int, piece: Piece) -> dict[str, Any]:
    """A piece of a text."""
    text = {"content": piece.text} if piece.text or not piece.finish else {}
    own = {"delta": text} if self.is_chat else {"text": piece.text}
    return {"index": index, **own, "logprobs": None, "finish_reason": piece.finish}

  def opening(self, index: int) -> dict[str, Any]:
    """The part before the pieces of a message."""
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


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
    return await self._answer(request, asked, prompts, asked.max_tokens, _TEXT)

  async def chat(self, request: Request) -> Response:
    """POST /v1/chat/completions."""
    asked = schemas.read(schemas.Chat, await bodies.read(request))
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
      raise Refused(400, "max_tokens and max_completion_tokens: give one of them")
    voice = self._voice(asked.model)
    prompt = await asyncio.to_thread(
      voice.of_chat,
      asked.messages,
      None if asked.tool_choice == "none" else asked.tools,
      asked.chat_template_kwargs,
    )
    room = self._language.engine.length - len(prompt)
    most = asked.max_completion_tokens or asked.max_tokens or max(room, 1)
    return await self._answer(request, asked, [prompt], most, _CHAT)

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
  ) -> Response:
    if asked.stream_options is not None and not asked.stream:
      raise Refused(400, "stream_options: the request asks for no stream")
    decoding = asked.decoding(most, secrets.randbits(32))
    answers = Answers(self._language, asked.model, prompts, decoding, asked.n)
    pieces = self._meters.metered(asked.model, answers)
    head = {
      "id": f"{form.prefix}-{secrets.token_hex(12)}",
      "created": int(time.time()),
      "model": asked.model,
    }
    if asked.stream:
      events = _events(head, form, answers, pieces, asked.stream_options)
      return StreamingResponse(events, media_type="text/event-stream")
    collected = asyncio.ensure_future(_collected(pieces, len(answers), form))
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


async def _collected(
  pieces: AsyncIterator[tuple[int, Piece]], choices: int, form: _Form
) -> list[dict[str, Any]]:
  texts: list[list[str]] = [[] for _ in range(choices)]
  finishes: list[str | None] = [None] * choices
  async for index, piece in pieces:
    texts[index].append(piece.text)
    finishes[index] = piece.finish
  return [
    form.choice(index, "".join(text), finish)
    for index, (text, finish) in enumerate(zip(texts, finishes, strict=True))
  ]


async def _events(
  head: dict[str, Any],
  form: _Form,
  answers: Answers,
  pieces: AsyncIterator[tuple[int, Piece]],
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
    async for index, piece in pieces:
      if piece.text or piece.finish:
        yield _event({**head, "choices": [form.part(index, piece)], **own})
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

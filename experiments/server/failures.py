"""Errors as OpenAI's clients read them."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lorax_flax.errors import LoraxError
from lorax_flax.serve.request import Busy, Closed, TimedOut

_STATUS: dict[type[LoraxError], int] = {Busy: 429, Closed: 503, TimedOut: 504}
_TYPES = {
  401: "authentication_error",
  404: "not_found_error",
  429: "rate_limit_error",
  499: "client_closed_request",
}


class Refused(LoraxError):
  """Refusal of a request with a status of HTTP."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


def status(error: LoraxError) -> int:
  """The status of HTTP that an error has; what can't be used is 400."""
  return error.status if isinstance(error, Refused) else _STATUS.get(type(error), 400)


def body(code: int, message: str) -> dict[str, object]:
  """The content of an answer that is an error."""
  # What it quotes may hold halves of characters.
  message = message.encode("utf-8", "replace").decode()
  kind = _TYPES.get(code, "invalid_request_error" if code < 500 else "server_error")
  return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def response(code: int, message: str) -> Response:
  """An answer that is an error."""
  headers = {"Retry-After": "1"} if code in (429, 503) else None
  return JSONResponse(body(code, message), code, headers)


async def of_ours(request: Request, error: Exception) -> Response:
  """The answer for a LoraxError."""
  assert isinstance(error, LoraxError)
  return response(status(error), str(error))


async def of_http(request: Request, error: Exception) -> Response:
  """The answer for a path or a method that there is not."""
  code = getattr(error, "status_code", 500)
  shown = f"{request.method} {request.url.path:.200}"
  messages = {404: f"no path for {shown}", 405: f"{shown}: another method is taken"}
  return response(code, messages.get(code, str(getattr(error, "detail", error))))


async def of_fault(request: Request, error: Exception) -> Response:
  """The answer for a fault of ours, which the log shows."""
  return response(500, "the server failed; its log says why")

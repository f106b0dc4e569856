"""API keys and the count of requests, before any route."""

import hmac
from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from experiments.server import failures
from experiments.server.meters import Meters

# What is served without a key: no more than that the server is there.
_OPEN = ("/", "/health")


class Guard:
  """Asks for a key, and counts requests by path and status."""

  def __init__(
    self, app: ASGIApp, keys: Sequence[str], meters: Meters, paths: Sequence[str]
  ):
    self._app, self._meters, self._paths = app, meters, frozenset(paths)
    self._keys = [key.encode() for key in keys]

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    path = scope["path"] if scope["path"] in self._paths else "other"

    async def counted(message: Message) -> None:
      if message["type"] == "http.response.start":
        self._meters.requests.labels(path, str(message["status"])).inc()
      await send(message)

    if self._knows(Request(scope)):
      await self._app(scope, receive, counted)
    else:
      refused = failures.response(401, "no such API key: Authorization: Bearer KEY")
      await refused(scope, receive, counted)

  def _knows(self, request: Request) -> bool:
    if not self._keys or request.url.path in _OPEN:
      return True
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    # All of them: the time is not to tell which is nearest.
    return sum(hmac.compare_digest(given, key) for key in self._keys) > 0

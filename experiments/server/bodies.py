"""Bodies of requests, bounded in size and time."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from experiments.server.failures import Refused

_MOST_BYTES = 8 << 20
_SECONDS = 30.0


async def read(request: Request) -> bytes:
  """The body of a request.

  Raises:
    Refused: one that is too large, or comes too slowly.
  """
  parts: list[bytes] = []
  size = 0
  try:
    async with asyncio.timeout(_SECONDS):
      async for part in request.stream():
        size += len(part)
        if size > _MOST_BYTES:
          raise Refused(413, f"the request is larger than {_MOST_BYTES:,} bytes")
        parts.append(part)
  except ClientDisconnect as error:
    raise Refused(499, "the client left before the request's end") from error
  except TimeoutError as error:
    raise Refused(408, f"the request took more than {_SECONDS:g} seconds") from error
  return b"".join(parts)


async def gone(request: Request) -> None:
  """Returns once the client has left; the body has been read before."""
  while (await request.receive())["type"] != "http.disconnect":
    pass

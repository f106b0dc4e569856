"""The application: routes, errors, keys and the end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from experiments.server import failures
from experiments.server.classifiers import Classifiers
from experiments.server.guard import Guard
from experiments.server.labels import Labels
from experiments.server.language import Language
from experiments.server.meters import Meters
from experiments.server.names import Names
from experiments.server.texts import Texts
from lorax_flax.errors import LoraxError

_PAGE = Path(__file__).with_name("page.html")
# The page needs nothing but this server.
_POLICY = (
  "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; "
  "script-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"
)


def create(served: Language | Classifiers, keys: Sequence[str] = ()) -> Starlette:
  """Makes the application.

  Args:
    served: what answers; it is closed at the end.
    keys: any of them opens the API; none: it is open.
  """
  meters, names = Meters(), Names(served)
  routes = [
    Route("/", _page),
    Route("/health", _health),
    Route("/metrics", meters.metrics),
    Route("/v1/models", names.models),
    Route("/v1/load_lora_adapter", names.load, methods=["POST"]),
    Route("/v1/unload_lora_adapter", names.unload, methods=["POST"]),
  ]
  if isinstance(served, Language):
    texts, engine = Texts(served, meters), served.engine
    routes += [
      Route("/v1/completions", texts.completions, methods=["POST"]),
      Route("/v1/chat/completions", texts.chat, methods=["POST"]),
      Route("/v1/embeddings", texts.embeddings, methods=["POST"]),
    ]
    meters.gauge("waiting", "Requests that wait.", lambda: engine.waiting)
    about = "Tokens of prompts that another text of the adapter had computed."
    meters.gauge("prefix_tokens_reused", about, lambda: engine.reused)
    meters.gauge("running", "Texts that are being written.", lambda: engine.running)
  else:
    classify = Labels(served).classify
    routes.append(Route("/v1/classify", classify, methods=["POST"]))

  @contextlib.asynccontextmanager
  async def lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    await asyncio.to_thread(served.close)

  paths = [route.path for route in routes]
  return Starlette(
    routes=routes,
    lifespan=lifespan,
    middleware=[Middleware(Guard, keys=keys, meters=meters, paths=paths)],
    exception_handlers={
      LoraxError: failures.of_ours,
      HTTPException: failures.of_http,
      Exception: failures.of_fault,
    },
  )


async def _page(request: Request) -> Response:
  """GET /: asks two models the same."""
  headers = {"Content-Security-Policy": _POLICY}
  return FileResponse(_PAGE, media_type="text/html", headers=headers)


async def _health(request: Request) -> Response:
  """GET /health."""
  return PlainTextResponse("ok")

"""Classification: the route."""

import asyncio
import secrets
import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from experiments.server import bodies, schemas
from experiments.server.classifiers import Classifiers
from experiments.server.failures import Refused

_MOST_TEXTS = 1024


class Labels:
  """The route of classifiers."""

  def __init__(self, classifiers: Classifiers):
    self._classifiers = classifiers

  async def classify(self, request: Request) -> Response:
    """POST /v1/classify."""
    asked = schemas.read(schemas.Classify, await bodies.read(request))
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    if not 1 <= len(texts) <= _MOST_TEXTS:
      raise Refused(
        400, f"input: {len(texts)} texts; from 1 to {_MOST_TEXTS} are taken"
      )
    if asked.model not in self._classifiers.models:
      known = ", ".join(self._classifiers.models)
      raise Refused(404, f"unknown model {asked.model!r:.200}. There are: {known}")
    found = await asyncio.to_thread(self._classifiers.scores, asked.model, texts)
    data = []
    for index, scores_C in enumerate(found.scores_NxC.tolist()):
      scores = dict(zip(found.labels, scores_C, strict=True))
      best = max(scores, key=scores.__getitem__)
      data.append(
        {
          "index": index,
          "label": best,
          "scores": scores,
          "probs": scores_C,
          "num_classes": len(scores_C),
        }
      )
    content = {
      "id": f"classify-{secrets.token_hex(12)}",
      "object": "list",
      "created": int(time.time()),
      "model": asked.model,
      "data": data,
      "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens},
    }
    return JSONResponse(content)

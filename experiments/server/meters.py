"""Meters of the server, for Prometheus."""

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import prometheus_client as prometheus
from starlette.requests import Request
from starlette.responses import Response

from experiments.server.answers import Answers
from lorax_flax.serve.request import Piece

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Meters:
  """Counters and histograms of one server."""

  def __init__(self) -> None:
    self._registry = prometheus.CollectorRegistry()
    own: dict[str, Any] = {"registry": self._registry}
    self.requests = prometheus.Counter(
      "lorax_requests", "Requests by path and status.", ("path", "status"), **own
    )
    self._prompt_tokens = prometheus.Counter(
      "lorax_prompt_tokens", "Tokens of prompts.", ("model",), **own
    )
    self._tokens = prometheus.Counter(
      "lorax_generated_tokens", "Tokens that were written.", ("model",), **own
    )
    self._first = prometheus.Histogram(
      "lorax_time_to_first_token_seconds",
      "Time from a request to its first token.",
      buckets=_SECONDS,
      **own,
    )
    self._between = prometheus.Histogram(
      "lorax_time_between_tokens_seconds",
      "Time between two tokens of a text.",
      buckets=_SECONDS,
      **own,
    )

  def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
    """Adds what is asked for whenever the meters are read."""
    made = prometheus.Gauge(f"lorax_{name}", about, registry=self._registry)
    made.set_function(value)

  async def metered(
    self, model: str, answers: Answers
  ) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of answers, counted and timed."""
    last = dict.fromkeys(range(len(answers)), time.monotonic())
    begun: set[int] = set()
    self._prompt_tokens.labels(model).inc(answers.prompt_tokens)
    async for index, piece in answers.pieces():
      now = time.monotonic()
      (self._between if index in begun else self._first).observe(now - last[index])
      begun.add(index)
      last[index] = now
      self._tokens.labels(model).inc()
      yield index, piece

  async def metrics(self, request: Request) -> Response:
    """GET /metrics."""
    text = prometheus.generate_latest(self._registry)
    return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

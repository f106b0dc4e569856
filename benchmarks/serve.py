"""Requests to a running server at rising load: how many, how soon, how evenly.

  python -m benchmarks.serve --url=http://127.0.0.1:8000 --clients=1,2,4,8,16
  python -m benchmarks.serve --classify

Clients ask one request after another, each time of the next model that the server has,
and read its stream. Any server of OpenAI's API will do. Times to the first token and
between two tokens are of all requests of a load; what was refused is counted. With
--classify a request is a headline for /v1/classify, and the first token is the answer.
"""

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from benchmarks import common
from lorax_flax.data import headlines


@dataclass
class _Seen:
  """Times that the clients of one load saw, in seconds."""

  first: list[float] = field(default_factory=list)
  between: list[float] = field(default_factory=list)
  failed: int = 0


# A client's request, and what it saw of the answer.
_Ask = Callable[[httpx.AsyncClient, dict[str, Any], _Seen], Awaitable[None]]


async def _complete(
  client: httpx.AsyncClient, body: dict[str, Any], seen: _Seen
) -> None:
  before, times = time.perf_counter(), seen.first
  async with client.stream("POST", "/v1/completions", json=body) as answer:
    answer.raise_for_status()
    async for line in answer.aiter_lines():
      if not line.startswith("data: {"):
        continue
      if "error" in json.loads(line.removeprefix("data: ")):
        seen.failed += 1
        return
      now = time.perf_counter()
      times.append(now - before)
      before, times = now, seen.between


async def _classify(
  client: httpx.AsyncClient, body: dict[str, Any], seen: _Seen
) -> None:
  before = time.perf_counter()
  (await client.post("/v1/classify", json=body)).raise_for_status()
  seen.first.append(time.perf_counter() - before)


async def _load(
  client: httpx.AsyncClient, ask: _Ask, bodies: Iterator[dict[str, Any]], clients: int
) -> _Seen:
  """Asks until there are no more bodies."""
  seen = _Seen()

  async def one() -> None:
    for body in bodies:
      try:
        await ask(client, body, seen)
      except httpx.HTTPError:
        seen.failed += 1

  await asyncio.gather(*(one() for _ in range(clients)))
  return seen


def _bodies(models: list[str], count: int, args: Any) -> Iterator[dict[str, Any]]:
  rng = np.random.default_rng(0)
  texts = headlines.load().train if args.classify else []
  for i, model in zip(range(count), itertools.cycle(models), strict=False):
    if args.classify:
      yield {"model": model, "input": [texts[i % len(texts)]["text"]]}
      continue
    ids = rng.integers(100, 1000, args.prompt).tolist()
    fields = {"max_tokens": args.tokens, "temperature": 0, "stream": True}
    yield {"model": model, "prompt": ids, **fields}


async def _rows(args: Any) -> list[tuple[Any, ...]]:
  headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
  limits = httpx.Limits(max_connections=None)
  async with httpx.AsyncClient(
    base_url=args.url, headers=headers, timeout=600, limits=limits
  ) as client:
    answer = (await client.get("/v1/models")).raise_for_status().json()
    models = [model["id"] for model in answer["data"]]
    ask = _classify if args.classify else _complete
    await _load(client, ask, _bodies(models, 2, args), 1)  # Compiles.
    rows = []
    for clients in args.clients:
      begun, count = time.perf_counter(), args.requests * clients
      seen = await _load(client, ask, _bodies(models, count, args), clients)
      seconds = time.perf_counter() - begun
      done = count - seen.failed
      tokens = len(seen.first) + len(seen.between)
      rows.append(
        (
          clients,
          f"{done / seconds:.2f}",
          f"{tokens / seconds:.1f}",
          *(_milliseconds(seen.first, share) for share in (50, 99)),
          *(_milliseconds(seen.between, share) for share in (50, 99)),
          seen.failed,
        )
      )
  return rows


def _milliseconds(times: list[float], share: int) -> str:
  return f"{1e3 * np.percentile(times, share):.0f}" if times else ""


def main() -> None:
  integers = lambda text: [int(part) for part in text.split(",")]
  parser = argparse.ArgumentParser()
  parser.add_argument("--url", default="http://127.0.0.1:8000")
  parser.add_argument("--api_key")
  parser.add_argument("--clients", type=integers, default=[1, 2, 4, 8, 16])
  parser.add_argument("--requests", type=int, default=4, help="of each client")
  parser.add_argument("--prompt", type=int, default=64, help="tokens")
  parser.add_argument("--classify", action="store_true", help="a classifier's server")
  parser.add_argument("--tokens", type=int, default=32, help="new ones")
  args = parser.parse_args()
  rows = asyncio.run(_rows(args))
  names = ("first p50", "first p99", "between p50", "between p99")
  header = ("clients", "requests/s", "events/s", *(f"{n}, ms" for n in names), "failed")
  asked = "a headline" if args.classify else f"{args.prompt} + {args.tokens} tokens"
  title = f"{args.url}: {asked} a request"
  print(common.table(title, header, rows))
  print(common.repeat())


if __name__ == "__main__":
  main()

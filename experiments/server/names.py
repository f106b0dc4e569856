"""The models by name: their list, and adapters that come and go."""

import asyncio
import time
from typing import Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from experiments.server import bodies, schemas


class Served(Protocol):
  """Models that answer under several names."""

  base: str
  task: str

  @property
  def models(self) -> list[str]:
    """The names that answer, the base's first."""

  def load(self, name: str, path: str) -> None:
    """Serves an adapter of the folder under a name."""

  def unload(self, name: str) -> None:
    """Forgets an adapter."""

  def close(self) -> None:
    """Takes no more requests, and returns once all have been answered."""


class Names:
  """Routes of models' names, as of OpenAI's and of vLLM's."""

  def __init__(self, served: Served):
    self._served, self._created = served, int(time.time())

  async def models(self, request: Request) -> Response:
    """GET /v1/models."""
    base = self._served.base
    found = [
      {
        "id": name,
        "object": "model",
        "created": self._created,
        "owned_by": "lorax_flax",
        "root": base,
        "task": self._served.task,
        "parent": None if name == base else base,
      }
      for name in self._served.models
    ]
    return JSONResponse({"object": "list", "data": found})

  async def load(self, request: Request) -> Response:
    """POST /v1/load_lora_adapter."""
    asked = schemas.read(schemas.LoadAdapter, await bodies.read(request))
    path = asked.lora_path or asked.lora_name
    await asyncio.to_thread(self._served.load, asked.lora_name, path)
    name = asked.lora_name
    return PlainTextResponse(f"Success: LoRA adapter {name!r} added successfully.")

  async def unload(self, request: Request) -> Response:
    """POST /v1/unload_lora_adapter."""
    asked = schemas.read(schemas.UnloadAdapter, await bodies.read(request))
    await asyncio.to_thread(self._served.unload, asked.lora_name)
    name = asked.lora_name
    return PlainTextResponse(f"Success: LoRA adapter {name!r} removed successfully.")

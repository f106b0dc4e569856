"""Noticing at once that another process of the run is gone.

A collective whose peer has died may wait for it without end, and JAX's own heartbeats
take half a minute and then abort without a word that a person could use. So each
process keeps a connection to the first one, on which nothing is sent: the system closes
it when a process dies, however it dies. A machine that vanishes without closing
anything is left to the heartbeats.
"""

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from lorax_flax.distributed import coordinator, processes

# Whoever connects sends a secret that only the run knows, and its number.
_TOKEN = 32
_SIZE = 8  # of every message: a number, or the goodbye
_BYE = b"bye".ljust(_SIZE)
_ADDRESS = 512  # bytes that hold where the first process listens
# How long an error waits to be explained by the end of another process, in seconds.
_EXPLAINED = 1.5


class Watch:
  """Context in which the end of another process ends this one, with a message.

  An error of this process ends it at once as well: what ends a Python process in order
  would wait for the others, who wait for this one. `processes.Preempted` is none.

  With a single process it does nothing.
  """

  def __init__(self, explain: Callable[[BaseException], str | None]):
    """`explain` gives an error's message for the user, None for a fault of ours."""
    self._explain = explain
    self._ending = threading.Lock()
    self._leaving = False
    self._peers: dict[socket.socket, int] = {}

  def __enter__(self) -> Self:
    """Every process has to; waits for the first one."""
    if jax.process_count() == 1:
      return self
    listener, address = None, b""
    if processes.first():
      listener, address = _listen()
    padded = np.frombuffer(address.ljust(_ADDRESS), np.uint8)
    address = bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded)))
    host, port, token = json.loads(address)
    if listener is not None:
      follow = lambda: self._first(listener, token)
    else:
      try:
        self._peers[_connect(host, port, token)] = 0
      except OSError as error:
        print(
          f"can't watch the first process at {host}:{port}: {error}. That it, or any "
          f"other, is gone will be noticed after {processes.HEARTBEAT} s",
          file=sys.stderr,
        )
        return self
      follow = self._other
    threading.Thread(target=follow, daemon=True).start()
    return self

  def __exit__(self, kind, error, trace) -> None:
    if jax.process_count() == 1:
      return
    if error is None or isinstance(error, processes.Preempted):
      self._leaving = True
      self._tell(_BYE)
      return
    # The end of another process may be what this one's error comes of. The thread that
    # watches ends the process then.
    time.sleep(_EXPLAINED if isinstance(error, Exception) else 0)
    message = self._explain(error)
    if message is None:
      message = "".join(traceback.format_exception(error)).rstrip()
    self._end(message)

  def _first(self, listener: socket.socket, token: str) -> None:
    """Waits for the others to connect, and for any of them to be gone."""
    with selectors.DefaultSelector() as events:
      events.register(listener, selectors.EVENT_READ)
      while True:
        for key, _ in events.select():
          peer = key.fileobj
          assert isinstance(peer, socket.socket)
          if peer is listener:
            new, number = _accept(listener, token)
            if new is not None:
              self._peers[new] = number
              events.register(new, selectors.EVENT_READ)
          elif _receive(peer) == _BYE:
            events.unregister(peer)
            del self._peers[peer]
          else:
            self._lost(self._peers[peer])

  def _other(self) -> None:
    """Waits for the first process to send which one is gone, or to be gone itself."""
    (first,) = self._peers
    message = _receive(first)
    if message != _BYE:
      self._lost(int(message or b"0"))

  def _lost(self, number: int) -> None:
    if self._leaving:
      return
    self._tell(str(number).encode().ljust(_SIZE))
    self._end(
      f"error: process {number} of {jax.process_count()} is gone: this one, process "
      f"{jax.process_index()}, ends too. The same command goes on from the last "
      "checkpoint",
      processes.LOST,
    )

  def _tell(self, message: bytes) -> None:
    for peer in list(self._peers):
      with contextlib.suppress(OSError):  # It may be gone as well.
        peer.sendall(message)

  def _end(self, message: str, code: int = 1) -> None:
    self._ending.acquire()  # Kept: whoever is first has the word.
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _listen() -> tuple[socket.socket, bytes]:
  """A socket to connect to; and its address, with a new secret, as JSON."""
  # As the cluster calls it: other machines may not know it by its own name.
  host = coordinator.host() or socket.gethostname()
  # Where the others reach this machine through another name, any address will do.
  local = host in ("127.0.0.1", "localhost")
  listener = socket.create_server((host if local else "", 0))
  address = json.dumps(
    [host, listener.getsockname()[1], secrets.token_hex(_TOKEN // 2)]
  )
  return listener, address.encode()


def _connect(host: str, port: int, token: str) -> socket.socket:
  peer = socket.create_connection((host, port), timeout=10)
  peer.settimeout(None)
  peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  peer.sendall(token.encode() + str(jax.process_index()).encode().ljust(_SIZE))
  return peer


def _accept(listener: socket.socket, token: str) -> tuple[socket.socket | None, int]:
  """Another process and its number; None for what is none."""
  peer, _ = listener.accept()
  try:
    peer.settimeout(5)
    received = peer.recv(_TOKEN + _SIZE, socket.MSG_WAITALL)
    peer.settimeout(None)
    if not hmac.compare_digest(received[:_TOKEN], token.encode()):
      raise ValueError("a stranger")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return peer, int(received[_TOKEN:])
  except (OSError, ValueError):
    peer.close()
    return None, -1


def _receive(peer: socket.socket) -> bytes:
  """A message; nothing where the other end is gone."""
  try:
    return peer.recv(_SIZE, socket.MSG_WAITALL)
  except OSError:
    return b""

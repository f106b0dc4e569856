"""Counts compiled programs."""

import contextlib

import jax


@contextlib.contextmanager
def counted():
  """Yields a list that gets the name of each program that is compiled."""
  found = []

  def listen(event, duration, fun_name="", **_):
    del duration
    if event == "/jax/core/compile/backend_compile_duration":
      found.append(fun_name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)

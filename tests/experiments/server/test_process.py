"""The command, in a process of its own, asked by OpenAI's own client."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from tests.experiments import peers

MESSAGES = [{"role": "user", "content": "three four"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def _port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


@contextlib.contextmanager
def _server(root, *flags):
  port = _port()
  command = [sys.executable, "-m", "experiments.serve", f"--base={root / 'tiny'}"]
  command += [f"--adapters={root / 'adapters'}", f"--port={port}", *flags]
  process = subprocess.Popen(
    command,
    cwd=peers.ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  try:
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
      with contextlib.suppress(httpx.TransportError):
        if httpx.get(f"{url}/health").is_success:
          break
      assert process.poll() is None, process.communicate()[0]
      time.sleep(0.2)
    yield process, url
  finally:
    process.kill()
    process.communicate()


def test_an_unmodified_client_is_answered_and_sigterm_drains(root, alone):
  flags = ("--api_key=secret", "--rows=2", "--max_length=1024")
  with _server(root, *flags) as (process, url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="no such API key"):
      client.with_options(api_key="wrong").models.list()
    assert [model.id for model in client.models.list()] == ["tiny", "first", "second"]

    for name in ("tiny", "first", "second"):
      found = client.completions.create(
        model=name, prompt="five six", max_tokens=12, temperature=0
      )
      assert found.choices[0].text == alone(name, "five six", 12)
      assert found.usage.completion_tokens == 12

    asked = {"model": "second", "messages": MESSAGES, "tools": TOOLS, "temperature": 0}
    full = client.chat.completions.create(**asked, max_tokens=8)
    with client.chat.completions.create(**asked, max_tokens=8, stream=True) as stream:
      pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == full.choices[0].message.content
    assert len(pieces) > 3
    without = client.chat.completions.create(
      model="second", messages=MESSAGES, max_tokens=1
    )
    assert without.usage.prompt_tokens < full.usage.prompt_tokens

    with pytest.raises(openai.NotFoundError, match="did you mean 'first'"):
      client.completions.create(model="frist", prompt="one")
    with pytest.raises(openai.BadRequestError, match="'logprobs' is not supported"):
      client.completions.create(model="first", prompt="one", logprobs=2)

    # A client that vanishes frees its row.
    long = {"model": "tiny", "prompt": "one", "max_tokens": 1000, "temperature": 0}
    stream = client.completions.create(**long, stream=True)
    next(iter(stream))
    stream.close()
    headers = {"Authorization": "Bearer secret"}
    running = lambda: (
      "lorax_running 0.0" in httpx.get(f"{url}/metrics", headers=headers).text
    )
    deadline = time.monotonic() + 20
    while not running():
      assert time.monotonic() < deadline

    # SIGTERM: what runs is finished, nothing new is taken, and the exit is 0.
    texts = []

    def read(stream):
      texts.extend(chunk.choices[0].text for chunk in stream)

    stream = client.completions.create(**{**long, "max_tokens": 300}, stream=True)
    texts.append(next(iter(stream)).choices[0].text)
    reading = threading.Thread(target=read, args=(stream,))
    reading.start()
    process.send_signal(signal.SIGTERM)
    reading.join(60)
    assert process.wait(60) == 0
    assert "".join(texts) == alone("tiny", "one", 300)
    with pytest.raises(openai.APIConnectionError):
      client.models.list()


def test_a_missing_package_is_an_error_that_names_the_extra(root):
  program = (
    "import sys; sys.modules['uvicorn'] = None; sys.argv = ['serve', '--base=x']; "
    "import runpy; runpy.run_module('experiments.serve', run_name='__main__')"
  )
  done = peers.python("-c", program)
  assert done.returncode == 1
  assert "pip install 'lorax-flax[serve]'" in done.stderr

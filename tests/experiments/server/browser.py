"""A headless Chromium, told what to do over a pipe."""

import contextlib
import json
import os
import shutil
import subprocess
import time

BINARY = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
  """One page of a browser."""

  def __init__(self, commands, answers):
    self._commands, self._answers = commands, answers
    self._number, self._session = 0, None

  def open(self, url):
    target = self._call("Target.createTarget", url=url)["targetId"]
    attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
    self._session = attached["sessionId"]

  def run(self, script):
    """The value of an expression of JavaScript."""
    found = self._evaluated(script)
    assert "exceptionDetails" not in found, found
    return found["result"].get("value")

  def until(self, script):
    """The value of an expression, once it is true; the page may be loading."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
      found = self._evaluated(script)
      if "exceptionDetails" not in found and found["result"].get("value"):
        return found["result"]["value"]
      time.sleep(0.05)
    raise AssertionError(f"never: {script}, {found}")

  def _evaluated(self, script):
    return self._call("Runtime.evaluate", expression=script, returnByValue=True)

  def _call(self, method, **params):
    self._number += 1
    message = {"id": self._number, "method": method, "params": params}
    if self._session is not None:
      message["sessionId"] = self._session
    self._commands.write(json.dumps(message).encode() + b"\0")
    self._commands.flush()
    while True:
      text = b""
      while not text.endswith(b"\0"):
        byte = self._answers.read(1)
        assert byte, "the browser ended"
        text += byte
      answer = json.loads(text[:-1])
      if answer.get("id") == self._number:
        assert "error" not in answer, answer
        return answer["result"]


@contextlib.contextmanager
def browser(folder):
  commands_out, commands_in = os.pipe()
  answers_out, answers_in = os.pipe()
  flags = f"--headless --no-sandbox --disable-gpu --user-data-dir={folder}"
  command = f"{BINARY} {flags} --remote-debugging-pipe about:blank"
  process = subprocess.Popen(
    ["bash", "-c", f"exec {command} 3<&{commands_out} 4>&{answers_in}"],
    pass_fds=(commands_out, answers_in),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  os.close(commands_out)
  os.close(answers_in)
  try:
    with os.fdopen(commands_in, "wb") as writes, os.fdopen(answers_out, "rb") as reads:
      yield Browser(writes, reads)
  finally:
    process.kill()
    process.wait()

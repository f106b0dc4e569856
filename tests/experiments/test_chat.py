"""The command chat: over a pipe and in a terminal, with the texts of `generate`."""

import functools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

from experiments.chat import PICTURES
from experiments.generate import generate
from experiments.inference import writers
from experiments.inference.dialogue import Dialogue
from lorax_flax.errors import LoraxError
from lorax_flax.serve.settings import Decoding
from tests.experiments import own_text, peers

NEW, SYSTEM = 5, "two"
QUESTIONS = ("one", "three four")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A model that goes on to the last token it may write, and has a chat template."""
  folder = tmp_path_factory.mktemp("chat")
  own_text.decoder(folder, own_text.UNMARKED)
  (folder / "generation_config.json").write_text("{}")
  return _with_room(folder, 256)


def _with_room(folder, tokens):
  """The folder's model, made to take so many tokens."""
  config = json.loads((folder / "config.json").read_text())
  config["max_position_embeddings"] = tokens
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def _copy(base, folder, tokens):
  for file in base.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  return _with_room(folder, tokens)


@pytest.fixture(scope="module")
def answers(base, tmp_path_factory):
  """What `generate` answers to the questions, one after another."""
  folder, said = tmp_path_factory.mktemp("generate"), []
  messages = [{"role": "system", "content": SYSTEM}]
  for number, question in enumerate(QUESTIONS):
    messages.append({"role": "user", "content": question})
    source, out = folder / f"{number}.jsonl", folder / f"{number}-out.jsonl"
    source.write_text(json.dumps({"messages": messages}) + "\n")
    decoding = Decoding(max_new_tokens=NEW)
    generate(str(base), None, str(source), str(out), decoding)
    said.append(json.loads(out.read_text())["text"])
    messages.append({"role": "assistant", "content": said[-1]})
  return said


def _command(base, *flags):
  return [sys.executable, "-m", "experiments.chat", f"--base={base}", *flags]


@functools.cache
def _writer(base):
  return writers.load(base, None)


def _dialogue(base, **options):
  writer, folder = _writer(str(base))
  decoding = options.pop("decoding", Decoding(max_new_tokens=NEW))
  return Dialogue(writer, folder, decoding, **options)


def test_lines_of_a_pipe_are_answered_as_by_generate(base, answers):
  first, second = QUESTIONS
  lines = [first, "", second, "/reset", first, "/quit", second]
  done = subprocess.run(
    _command(base, f"--max_new_tokens={NEW}", f"--system={SYSTEM}"),
    input="\n".join(lines),
    capture_output=True,
    encoding="utf-8",
    cwd=peers.ROOT,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == "".join(f"{text}\n" for text in (*answers, answers[0]))


# The first terminal that a session opens controls it: Ctrl-C is for its processes.
_CONTROLLED = """
import os, sys
os.open(sys.argv[1], os.O_RDWR)
os.execv(sys.argv[2], sys.argv[2:])
"""


class Terminal:
  """A process in a terminal of its own, with a person's hands."""

  def __init__(self, command):
    self._here, there = pty.openpty()
    self._process = subprocess.Popen(
      [sys.executable, "-c", _CONTROLLED, os.ttyname(there), *command],
      stdin=there,
      stdout=there,
      stderr=there,
      cwd=peers.ROOT,
      start_new_session=True,
      env={**os.environ, "TERM": "dumb"},
    )
    self._there, self.seen = there, ""

  def type(self, text):
    os.write(self._here, text.encode())

  def until(self, pattern, seconds=120):
    """What is shown up to a pattern, from where the last one ended."""
    end = time.monotonic() + seconds
    while not (found := re.search(pattern, self.seen)):
      ready, _, _ = select.select([self._here], [], [], 0.2)
      if ready:
        self.seen += os.read(self._here, 65536).decode("utf-8", "replace")
      assert time.monotonic() < end, self.seen
    text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
    return text

  def ends(self, seconds=60):
    return self._process.wait(seconds)

  def kill(self, number):
    self._process.send_signal(number)

  @property
  def is_sane(self):
    """True where the terminal echoes what is typed, and gives it line by line."""
    flags = termios.tcgetattr(self._there)[3]
    return bool(flags & termios.ECHO and flags & termios.ICANON)

  def close(self):
    if self._process.poll() is None:
      self._process.kill()
      self._process.wait()
    os.close(self._here)
    os.close(self._there)


@pytest.fixture
def terminal():
  opened = []

  def start(command):
    opened.append(Terminal(command))
    return opened[-1]

  yield start
  for each in opened:
    each.close()


def test_a_chat_in_a_terminal(base, answers, terminal):
  person = terminal(_command(base, f"--max_new_tokens={NEW}", f"--system={SYSTEM}"))
  person.until("Ctrl-D or /quit ends.*> ".replace(".*", r"[\s\S]*"))
  # A model's control characters are shown, and do nothing.
  shown = lambda text: re.escape(text.translate(PICTURES).replace("\n", "\r\n"))
  for question, answer in zip(QUESTIONS, answers, strict=True):
    person.type(f"{question}\n")
    person.until(shown(answer) + r"\r\n[\s\S]*> ")
  person.type("/rest\n")
  person.until(r"error: unknown command '/rest'; did you mean '/reset'.*\r\n[\s\S]*> ")
  person.type("\x04")
  assert person.ends() == 0
  assert person.is_sane


def test_ctrl_c_stops_an_answer_and_a_kill_leaves_the_terminal_as_it_was(
  base, terminal, tmp_path
):
  # With so much room no answer comes to its end here.
  endless = _copy(base, tmp_path, 1 << 17)
  person = terminal(_command(endless, "--max_new_tokens=100000", "--temperature=1"))
  person.until("> ")
  for question in QUESTIONS:
    person.type(f"{question}\n")
    person.until(rf"{question}\r\n[\s\S]{{5}}")
    person.type("\x03")
    person.until(r"\^C[\s\S]*\r\n[\s\S]*> ")
  person.type("two\n")
  person.until(r"two\r\n[\s\S]{5}")
  person.kill(signal.SIGKILL)
  assert person.ends() == -signal.SIGKILL
  assert person.is_sane


def test_a_chat_ended_while_a_line_is_typed_leaves_the_terminal_as_it_was(
  base, terminal
):
  person = terminal(_command(base))
  person.until("> ")
  person.type("on")
  person.until("on")
  # Python heeds a signal while it waits for a key, not on its way there.
  time.sleep(1)
  person.kill(signal.SIGTERM)
  assert person.ends() == 143
  assert person.is_sane


def test_an_answer_that_was_stopped_is_a_part_of_the_chat(base):
  talk, alone = _dialogue(base), _dialogue(base)
  pieces = talk.ask("one")
  said = next(pieces) + next(pieces)
  pieces.close()
  rest = "".join(talk.ask("two"))
  whole = "".join(alone.ask("one"))
  assert whole.startswith(said)
  alone.reset()
  alone._messages += [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": said},
  ]
  assert rest == "".join(alone.ask("two"))


def test_a_full_context_is_said_and_the_chat_stays_as_it_was(base, tmp_path):
  small = _copy(base, tmp_path, 64)
  talk = _dialogue(small, decoding=Decoding(max_new_tokens=200, min_new_tokens=100))
  said = "".join(talk.ask("one"))
  assert talk.full
  messages = list(talk._messages)
  assert messages[-1]["content"] == said
  with pytest.raises(LoraxError, match="takes 64 with the answer: /reset begins a new"):
    list(talk.ask("two"))
  assert talk._messages == messages
  talk.reset()
  assert "".join(talk.ask("one")) == said


def test_a_base_without_a_chat_template_names_the_flag(base, tmp_path):
  own_text.decoder(tmp_path, None)
  with pytest.raises(LoraxError, match=r"no chat template in .*--chat_template=FILE"):
    _dialogue(tmp_path)
  own = tmp_path / "own.jinja"
  own.write_text(own_text.UNMARKED)
  assert list(_dialogue(tmp_path, chat_template=str(own)).ask("one"))


def test_a_line_that_is_no_text_is_an_error_without_a_traceback(base):
  done = subprocess.run(
    _command(base),
    input=b"\xff\xfe\n",
    capture_output=True,
    cwd=peers.ROOT,
    check=False,
  )
  assert (done.returncode, done.stdout) == (1, b"")
  assert done.stderr.decode().strip() == "error: the line is not UTF-8"

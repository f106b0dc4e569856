"""A chat with a model in the terminal: answers are shown as they are written.

  lorax chat --base=smollm2 --adapter=RUN/adapter --system="Answer in one sentence."

Ctrl-C stops an answer, /reset begins a new chat, Ctrl-D or /quit ends. A chat is
written by the model's own template, or by --chat_template's; only what is new in it is
read at each turn.

By default each token is the most probable one; --temperature samples, the same answers
for the same --seed. Settings in the base's generation_config.json are not read, but for
the tokens that end a text.

Where standard input is no terminal, each of its lines is a question, and the answers
are the lines of standard output.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

from absl import flags

from experiments.cli import command as cli
from experiments.cli import decoding_flags, model_flags
from experiments.inference import writers
from experiments.inference.dialogue import Dialogue
from lorax_flax.distributed.processes import PREEMPTED
from lorax_flax.errors import LoraxError, check_known

FLAGS = flags.FlagValues()
BASE = model_flags.base(FLAGS)
ADAPTER = model_flags.adapter(FLAGS, required=False)
QUANT = model_flags.quant(FLAGS)
OTHER_BASE = model_flags.other_base(FLAGS)
SYSTEM = flags.DEFINE_string(
  "system", None, "Content of a first message, the system's.", flag_values=FLAGS
)
CHAT_TEMPLATE = model_flags.chat_template(FLAGS)
DECODING = decoding_flags.define(FLAGS)

QUIT, RESET = "/quit", "/reset"
HINT = "Ctrl-C stops an answer, /reset begins a new chat, Ctrl-D or /quit ends."
# Control characters as pictures of them: a model's text is not to change a terminal.
PICTURES = {
  **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
  0x7F: 0x2421,
  **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def converse(dialogue: Dialogue, lines: Iterator[str], in_terminal: bool) -> None:
  """Answers line after line on standard output, until they end or one is /quit.

  Args:
    in_terminal: an error is shown, and the chat goes on; otherwise it is raised.
  """
  for line in lines:
    try:
      if not _obey(dialogue, line.strip()):
        return
    except LoraxError as error:
      if not in_terminal:
        raise
      print(cli.explain(error), file=sys.stderr)


def _obey(dialogue: Dialogue, line: str) -> bool:
  """Answers a line, or does what it commands; False where that is the end."""
  first = line.split(maxsplit=1)[0] if line else ""
  if first.startswith("/") and first[1:].isalpha():
    check_known("command", line, (QUIT, RESET))
    if line == RESET:
      dialogue.reset()
    return line == RESET
  if line:
    _answer(dialogue, line)
  return True


def _answer(dialogue: Dialogue, line: str) -> None:
  """Shows an answer as it is written."""
  pictures = PICTURES if sys.stdout.isatty() else {}
  try:
    line.encode()
  except UnicodeEncodeError as error:
    raise LoraxError("the line is not UTF-8") from error
  with _interrupts() as interrupted, contextlib.closing(dialogue.ask(line)) as pieces:
    for piece in pieces:
      sys.stdout.write(piece.translate(pictures))
      sys.stdout.flush()
      if interrupted():
        break
  print(flush=True)
  if dialogue.full:
    print("The context is full: /reset begins a new chat.", file=sys.stderr)


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
  """Context in which Ctrl-C is noted, and raised at once where it comes again.

  Where standard input is no terminal it is raised at the first.
  """
  pressed: list[int] = []

  def note(number: int, frame: object) -> None:
    del frame
    if pressed or not sys.stdin.isatty():
      raise KeyboardInterrupt
    pressed.append(number)

  before = signal.signal(signal.SIGINT, note)
  try:
    yield lambda: bool(pressed)
  finally:
    signal.signal(signal.SIGINT, before)


def _typed() -> Iterator[str]:
  """Lines that a person types; Ctrl-C begins a line anew."""
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401, editing and history of lines
  while True:
    try:
      line = input("> ")
    except EOFError:
      print()
      return
    except KeyboardInterrupt:
      print()
      continue
    yield line


def _exit(*signal_and_frame: object) -> None:
  sys.exit(PREEMPTED)


def main() -> None:
  decoding = DECODING()
  writer, folder = writers.load(
    BASE.value, ADAPTER.value, QUANT.value, OTHER_BASE.value
  )
  dialogue = Dialogue(
    writer,
    folder,
    decoding,
    system=SYSTEM.value,
    chat_template=CHAT_TEMPLATE.value,
  )
  # A line that is no UTF-8 is to be refused by us.
  sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
  in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
  if in_terminal:
    # While a line is edited the terminal echoes nothing: it is set right on the way
    # out, which the system's own end of a process would not take.
    signal.signal(signal.SIGTERM, _exit)
    print(HINT)
  lines = _typed() if in_terminal else iter(sys.stdin)
  converse(dialogue, lines, in_terminal)


if __name__ == "__main__":
  cli.run(main, FLAGS)

"""The console that the progress bar and the log lines share."""

import logging

from rich.console import Console

from lorax_flax.distributed import processes

# One console: rich prints a log line above a bar that is being drawn.
CONSOLE = Console(highlight=False, soft_wrap=True)


class _Handler(logging.Handler):
  """Prints messages as they are, those of process 0 alone."""

  def emit(self, record: logging.LogRecord) -> None:
    try:
      CONSOLE.print(self.format(record), markup=False)
    except Exception:
      self.handleError(record)


def log_to_console() -> None:
  """Prints the package's log lines, from INFO up, on standard output.

  To be called once the processes are connected: the first one alone prints.
  """
  handler = _Handler()
  handler.addFilter(lambda record: processes.first())
  logger = logging.getLogger("lorax_flax")
  logger.setLevel(logging.INFO)
  logger.handlers = [handler]
  logger.propagate = False

"""Stand-ins for the clusters' clients, to be put on the PATH."""

import json
import sys
from pathlib import Path

# Writes down how it was called, and ends as it is told to.
_RECORDER = """#!{python}
import json, os, sys
with open({log!r}, "a") as out:
  told = not os.isatty(0) and {reads} and sys.stdin.read() or ""
  out.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:], told]) + "\\n")
sys.exit({code})
"""


class StandIns:
  """A folder for the PATH, and what its programs were called with."""

  def __init__(self, folder: Path):
    self.folder = folder
    folder.mkdir()
    self._log = folder / "calls"

  def recorder(self, name: str, code: int = 0, reads: bool = False) -> None:
    """A program that does nothing but write down its arguments and its input."""
    fields = {"python": sys.executable, "log": str(self._log), "code": code}
    self.program(name, _RECORDER.format(**fields, reads=reads))

  def program(self, name: str, text: str) -> None:
    (self.folder / name).write_text(text)
    (self.folder / name).chmod(0o755)

  def calls(self) -> list[list[str]]:
    """Of recorders, since this was asked last: name, arguments, input."""
    if not self._log.exists():
      return []
    found = [json.loads(line) for line in self._log.read_text().splitlines()]
    self._log.unlink()
    return found

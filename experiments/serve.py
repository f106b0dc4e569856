"""A server of a base and its adapters, with OpenAI's API (extra `serve`).

  python -m experiments.serve --base=smollm2 --adapters=DIR --port=8000

Each folder in DIR is an adapter of that name, of any form that `generate` reads; the
base answers under its own folder's name. A language model has /v1/completions and
/v1/chat/completions, streamed or not; a classifier has /v1/classify. Both have
/v1/models, /v1/load_lora_adapter and /v1/unload_lora_adapter, /health and /metrics.

All adapters share the base and are mixed in one batch, and loading one compiles
nothing. SIGTERM ends what is being written, takes no more, and exits with 0.
"""

import logging
import signal
from pathlib import Path

from absl import flags

from experiments.cli import command as cli
from experiments.cli import model_flags
from lorax_flax.errors import LoraxError
from lorax_flax.hub.resolve import resolve
from lorax_flax.jobs import compile_cache
from lorax_flax.models import registry

FLAGS = flags.FlagValues()
BASE = model_flags.base(FLAGS)
ADAPTERS = flags.DEFINE_string(
  "adapters", None, "A folder whose folders are adapters.", flag_values=FLAGS
)
HOST = flags.DEFINE_string("host", "127.0.0.1", "Where to listen.", flag_values=FLAGS)
PORT = flags.DEFINE_integer(
  "port", 8000, "Its port.", lower_bound=0, upper_bound=65535, flag_values=FLAGS
)
API_KEYS = flags.DEFINE_multi_string(
  "api_key",
  [],
  "A key that opens the API; may be given several times.",
  flag_values=FLAGS,
)
API_KEY_FILE = flags.DEFINE_string(
  "api_key_file", None, "A file with a key on each line.", flag_values=FLAGS
)
ROWS = flags.DEFINE_integer(
  "rows",
  8,
  "Number of texts that are written at once.",
  lower_bound=1,
  flag_values=FLAGS,
)
MAX_LENGTH = flags.DEFINE_integer(
  "max_length",
  2048,
  "Largest number of tokens of a prompt and its text, where the model takes as many.",
  lower_bound=2,
  flag_values=FLAGS,
)
WAITING = flags.DEFINE_integer(
  "waiting", 64, "Number of requests that may wait.", lower_bound=1, flag_values=FLAGS
)
SECONDS = flags.DEFINE_float(
  "seconds", 300.0, "Time that a text may take.", lower_bound=0.1, flag_values=FLAGS
)
CAPACITY = flags.DEFINE_integer(
  "capacity",
  8,
  "Number of adapters of a language model on the device; more take turns.",
  lower_bound=1,
  flag_values=FLAGS,
)
MAX_RANK = flags.DEFINE_integer(
  "max_rank",
  None,
  "Largest rank of an adapter of a language model (default: that of the folder's, "
  "and at least 16).",
  lower_bound=1,
  flag_values=FLAGS,
)
CHAT_TEMPLATE = model_flags.chat_template(FLAGS)
QUANT = model_flags.quant(FLAGS)
OTHER_BASE = model_flags.other_base(FLAGS)

_MOST_CONNECTIONS = 2048


def main() -> None:
  try:
    import uvicorn

    from experiments.server import app, start
  except ImportError as error:
    raise LoraxError(
      f"{error.name} can't be imported: it comes with the extra serve, "
      "pip install 'lorax-flax[serve]'"
    ) from error
  logging.basicConfig(level=logging.INFO)
  keys = start.keys(API_KEYS.value, API_KEY_FILE.value)
  folder = Path(BASE.value).expanduser()
  compile_cache.use(None)
  served = start.served(
    registry.load(resolve(BASE.value), quant=QUANT.value),
    folder.resolve().name if folder.exists() else folder.name,
    Path(ADAPTERS.value).expanduser() if ADAPTERS.value else None,
    quant=QUANT.value,
    other_base=OTHER_BASE.value,
    language={
      "rows": ROWS.value,
      "length": MAX_LENGTH.value,
      "waiting": WAITING.value,
      "seconds": SECONDS.value,
      "capacity": CAPACITY.value,
      "max_rank": MAX_RANK.value,
      "chat_template": CHAT_TEMPLATE.value,
    },
  )
  served.warm()
  # uvicorn raises the signal again once all has ended, which is to exit with 0.
  signal.signal(signal.SIGTERM, lambda number, frame: None)
  print(f"Serving {', '.join(served.models)} on http://{HOST.value}:{PORT.value}")
  uvicorn.run(
    app.create(served, keys),
    host=HOST.value,
    port=PORT.value,
    log_level="warning",
    limit_concurrency=_MOST_CONNECTIONS,
  )


if __name__ == "__main__":
  cli.run(main, FLAGS)

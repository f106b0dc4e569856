"""Held-out loss of a few hundred chats, before and after training, LoRA against full.

  python -m benchmarks.chats [--chats=300] [--steps=100]

The chats are made of the headlines that the quick start trains on: the assistant ends a
headline, and then says whether it is sarcastic. `chat.py` and `chat.py:full` train
SmolLM2 on them for as many steps, with each config's own learning rate. A run of one
step at no learning rate tells the loss before.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from lorax_flax.data import headlines

LABELS = ("It is sincere.", "It is sarcastic.")
BEFORE = ("--config.train.learning_rate=1e-12", "--config.train.steps=1")


def chats(number: int) -> Iterator[dict[str, Any]]:
  """Chats of two turns each."""
  for example in headlines.load().train[:number]:
    words = example["text"].split()
    half = len(words) // 2
    said = (
      f"End this headline: {' '.join(words[:half])}",
      " ".join(words[half:]),
      "Is it sincere or sarcastic?",
      LABELS[int(example["label"])],
    )
    roles = 2 * ("user", "assistant")
    yield {
      "messages": [
        {"role": role, "content": text} for role, text in zip(roles, said, strict=True)
      ]
    }


def train(config: str, file: Path, workdir: Path, arguments: Sequence[str]) -> Any:
  """The content of a run's result.json."""
  command = [sys.executable, "-m", "experiments.run", f"--config={config}"]
  command += [f"--config.data.path={file}", f"--workdir={workdir}", *arguments]
  subprocess.run(command, check=True, stdout=sys.stderr)
  return json.loads((workdir / "result.json").read_text())


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--chats", type=int, default=300)
  parser.add_argument("--steps", type=int, default=100)
  args = parser.parse_args()
  steps = (f"--config.train.steps={args.steps}",)
  rows = []
  with tempfile.TemporaryDirectory() as scratch:
    file = Path(scratch) / "chats.jsonl"
    file.write_text("".join(f"{json.dumps(chat)}\n" for chat in chats(args.chats)))
    for name, config, arguments in (
      ("before", "chat.py", BEFORE),
      ("LoRA", "chat.py", steps),
      ("full", "chat.py:full", steps),
    ):
      result = train(config, file, Path(scratch) / name, arguments)
      loss = math.log(result["perplexity"])
      row = (f"{loss:.3f}", f"{result['perplexity']:.2f}")
      trained = f"{result['trained_parameters']:,}"
      rows.append((name, *row, trained, f"{result['train_seconds']:,.0f}"))
  header = ("", "held-out loss", "perplexity", "trained", "training, s")
  title = f"SmolLM2-135M-Instruct, {args.chats} chats, {args.steps} steps"
  print(common.table(title, header, rows))
  print(common.repeat())


if __name__ == "__main__":
  main()

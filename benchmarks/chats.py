"""Held-out chats before and after training, LoRA against full: loss, BLEU, ROUGE-L.

  python -m benchmarks.chats [--chats=300] [--steps=100]

The chats are made of the headlines that the quick start trains on: the assistant ends a
headline, and then says whether it is sarcastic. `chat.py` and `chat.py:full` train
SmolLM2 on them for as many steps, with each config's own learning rate. A run of one
step at no learning rate tells the loss before. Every tenth chat is held out: each of
the assistant's turns there is generated too, greedily, after the true turns before it.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from experiments.inference import results, scored
from lorax_flax.data import headlines
from lorax_flax.metrics import texts

LABELS = ("It is sincere.", "It is sarcastic.")
BEFORE = ("--config.train.learning_rate=1e-12", "--config.train.steps=1")
BASE = "smollm2"
NEW_TOKENS = 32
HELD_OUT = 10  # every so many chats


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


def _run(module: str, *arguments: str) -> None:
  command = [sys.executable, "-m", f"experiments.{module}", *arguments]
  subprocess.run(command, check=True, stdout=sys.stderr)


def train(config: str, data: Path, workdir: Path, arguments: Sequence[str]) -> Any:
  """The content of a run's result.json."""
  given = (f"--config={config}", f"--config.data.path={data}", f"--workdir={workdir}")
  _run("run", *given, *arguments)
  return json.loads((workdir / "result.json").read_text())


def answers(workdir: Path, held_out: Sequence[dict[str, Any]]) -> Mapping[str, Any]:
  """Scores of the assistant's turns as a run's model writes them."""
  asked, said = [], []
  for chat in held_out:
    messages = chat["messages"]
    for n, message in enumerate(messages):
      if message["role"] == "assistant":
        asked.append({"messages": messages[:n]})
        said.append([message["content"]])
  prompts, written = workdir / "prompts.jsonl", workdir / "answers.jsonl"
  results.write(prompts, asked)
  full = workdir / "model"
  model = [f"--base={full if full.is_dir() else BASE}"]
  model += [] if full.is_dir() else [f"--adapter={workdir / 'adapter'}"]
  files = (f"--input={prompts}", f"--out={written}")
  _run("generate", *model, *files, f"--max_new_tokens={NEW_TOKENS}")
  return texts.scores(scored.outputs(written), said)


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
    made, data = list(chats(args.chats)), Path(scratch) / "data"
    held_out = made[::HELD_OUT]
    data.mkdir()
    results.write(data / "validation.jsonl", held_out)
    learnt = (chat for n, chat in enumerate(made) if n % HELD_OUT)
    results.write(data / "train.jsonl", learnt)
    for name, config, arguments in (
      ("before", "chat.py", BEFORE),
      ("LoRA", "chat.py", steps),
      ("full", "chat.py:full", steps),
    ):
      workdir = Path(scratch) / name
      result = train(config, data, workdir, arguments)
      found = answers(workdir, held_out)
      loss = math.log(result["perplexity"])
      row = [f"{loss:.3f}", f"{result['perplexity']:.2f}"]
      row += [f"{100 * found[score]:.2f}" for score in ("BLEU", "ROUGE-L")]
      trained = f"{result['trained_parameters']:,}"
      rows.append((name, *row, trained, f"{result['train_seconds']:,.0f}"))
  header = (
    "",
    "held-out loss",
    "perplexity",
    "BLEU",
    "ROUGE-L",
    "trained",
    "training, s",
  )
  title = f"SmolLM2-135M-Instruct, {args.chats} chats, {args.steps} steps"
  print(common.table(title, header, rows))
  print(common.repeat())


if __name__ == "__main__":
  main()

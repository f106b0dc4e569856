"""Scores generated texts: BLEU, NIST, METEOR, ROUGE-L and CIDEr in a table.

  python -m experiments.score --references=REFS.txt --outputs=OUT.jsonl

As the E2E challenge's script computes them (github.com/tuetschek/e2e-metrics, with -p),
with several references for each text. They need the extra metrics, and the last three
need Java: without it they are left out.
"""

from pathlib import Path

from absl import flags

from experiments.cli import command as cli
from experiments.inference import scored
from lorax_flax.metrics import texts

FLAGS = flags.FlagValues()
REFERENCES = flags.DEFINE_string(
  "references",
  None,
  "The references: .txt, one a line and a blank line between texts, or one for each "
  "text; or .csv of the columns mr and ref.",
  flag_values=FLAGS,
  required=True,
)
OUTPUTS = flags.DEFINE_string(
  "outputs",
  None,
  "The generated texts in the same order: .jsonl that generate wrote, or .txt, one a "
  "line.",
  flag_values=FLAGS,
  required=True,
)


def main() -> None:
  outputs = scored.outputs(Path(OUTPUTS.value).expanduser())
  references = scored.references(Path(REFERENCES.value).expanduser())
  print(scored.shown(texts.scores(outputs, references)))


if __name__ == "__main__":
  cli.run(main, FLAGS)

"""README.md of a model or an adapter: a model card as the Hugging Face hub reads it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_flax.files import atomic
from lorax_flax.hub import assets
from lorax_flax.hub.resolve import ALIASES

# Characters that Markdown, or HTML inside it, would take for more than themselves.
_MARKUP = re.compile(r"([\\`*_\[\]|~<>&])")
_LICENSE = ("license", "license_name", "license_link")


def text(
  title: str,
  data: Mapping[str, Any],
  facts: Mapping[str, Mapping[str, str]],
  code: Mapping[str, str],
  scores: Mapping[str, float] | None = None,
  dataset: str = "",
) -> str:
  """The text of a card.

  Args:
    title: heading.
    data: the YAML in front, by the hub's names: base_model, library_name, ….
    facts: texts by name, by section.
    code: code in Python or shell, by section.
    scores: of the best evaluation, by metric; None or {}: of no evaluation.
    dataset: that they are of.
  """
  # Here, because it takes half a second to import.
  import huggingface_hub as hub

  scores = scores or {}
  results = [
    hub.EvalResult(
      task_type=data.get("pipeline_tag", "other"),
      dataset_type=dataset,
      dataset_name=dataset,
      metric_type=name,
      metric_name=name,
      metric_value=value,
    )
    for name, value in scores.items()
  ]
  more: dict[str, Any] = {}
  if results:
    more = {"model_name": title, "metrics": [*scores], "eval_results": results}
  front = hub.ModelCardData(**data, **more).to_yaml()
  parts = [f"---\n{front}\n---", f"# {escape(title)}"]
  if scores:
    shown = {name: f"{value:.4f}" for name, value in scores.items()}
    facts = {"Scores": shown, **facts}
  for heading, values in facts.items():
    rows = [f"| {escape(n)} | {escape(value)} |" for n, value in values.items()]
    parts.append("\n".join([f"## {heading}\n", "| | |", "|---|---|", *rows]))
  parts += [f"## {heading}\n\n{_fenced(each)}" for heading, each in code.items()]
  return "\n\n".join(parts) + "\n"


def escape(value: str) -> str:
  """Text that Markdown shows as it is, in one line."""
  return _MARKUP.sub(r"\\\1", " ".join(value.split()))


def base_model(spec: str) -> str:
  """The name on the hub of a base that was asked for by it or by an alias.

  A folder's path stays: the name in its config.json is often that of its own base.
  """
  target = ALIASES.get(spec, spec)
  asset = _asset(spec)
  return target if asset is None else asset.hub_name


def license_of(spec: str, folder: Path) -> dict[str, str]:
  """The license that a base's own card states, as fields of a card; {}: none."""
  if (asset := _asset(spec)) is not None:
    return {"license": asset.license}
  file = folder / atomic.README
  if not file.is_file():
    return {}
  import huggingface_hub as hub

  try:
    said = hub.ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
  except Exception:  # Of YAML, of any kind: a base's card is not ours to judge.
    return {}
  return {name: str(said[name]) for name in _LICENSE if name in said}


def _asset(spec: str) -> assets.Asset | None:
  kind, _, name = ALIASES.get(spec, "").partition(":")
  return assets.ASSETS[name] if kind == "asset" else None


def _fenced(code: str) -> str:
  fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", code)), 3)
  language = "python" if "import " in code else "sh"
  return f"{fence}{language}\n{code.strip()}\n{fence}"

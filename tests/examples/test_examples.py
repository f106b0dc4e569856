"""The examples run as they are, each in a process of its own, and learn."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(path, tmp_path):
  missing = [
    name
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Import)
    for name in (alias.name.split(".")[0] for alias in node.names)
    if importlib.util.find_spec(name) is None
  ]
  if missing:
    pytest.skip(f"{missing[0]} is not installed")
  done = subprocess.run(
    [sys.executable, str(path)],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize(
  "path", [p for p in EXAMPLES if p.stem != "serving"], ids=lambda p: p.stem
)
def test_an_example_learns_and_its_merged_weights_do_the_same(path, tmp_path):
  printed = run(path, tmp_path)
  losses = [float(x) for x in re.findall(r"^step \d+: loss (\S+)$", printed, re.M)]
  assert len(losses) >= 4
  assert losses[-1] < 0.3 * losses[0], printed
  merged = re.search(r"^loss when merged: (\S+)$", printed, re.M)
  if path.stem != "own_data":
    assert float(merged[1]) == pytest.approx(losses[-1], rel=0.2)


def test_adapters_are_swapped_mixed_and_merged(tmp_path):
  printed = run(ROOT / "examples/serving.py", tmp_path)
  assert "swapped: programs compiled: 1\n" in printed
  difference = re.search(r"^mixed: largest difference: (\S+)$", printed, re.M)
  assert float(difference[1]) < 1e-4
  assert "merged: True\n" in printed
  assert "unmerged: True\n" in printed


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_short_and_says_how_it_is_run(path):
  text = path.read_text()
  assert len(text.splitlines()) <= 60
  assert f"python examples/{path.name}" in ast.get_docstring(ast.parse(text))

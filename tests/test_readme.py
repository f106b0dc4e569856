"""README's code runs, and prints what README says that it prints."""

import contextlib
import io
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [
  *("README.md", "CONTRIBUTING.md", "BUILD_NOTES.md"),
  *("benchmarks/README.md", "benchmarks/RESULTS.md"),
]


@pytest.mark.filterwarnings("default")
def test_the_api_on_a_page_prints_what_it_says():
  page = re.search(r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", README, re.S)
  printed = io.StringIO()
  # As a user's process has it, and not as the other tests do.
  with (
    contextlib.redirect_stdout(printed),
    jax.numpy_rank_promotion("allow"),
    jax.numpy_dtype_promotion("standard"),
  ):
    exec(page[1], {"__name__": "readme"})
  lines, expected = printed.getvalue().splitlines(), page[2].splitlines()
  loss = [i for i, line in enumerate(expected) if line.startswith("loss ")]
  assert len(loss) == 1
  # Its last digits depend on the processor.
  assert float(lines.pop(loss[0]).split()[1]) == pytest.approx(
    float(expected.pop(loss[0]).split()[1]), abs=5e-4
  )
  assert [line.rstrip() for line in lines] == [line.rstrip() for line in expected]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_modules_and_files_that_a_document_names_exist(name):
  text = (ROOT / name).read_text()
  # Code blocks of CONTRIBUTING show files that a reader adds.
  prose = re.sub(r"```diff.*?```", "", text, flags=re.S)
  modules = set(
    re.findall(r"python -m ((?:experiments|launch|benchmarks)\.\w+)", prose)
  )
  for module in modules:
    path = ROOT / module.replace(".", "/")
    assert path.is_dir() or path.with_suffix(".py").is_file(), module
  links = re.findall(r"\]\(([^)#:]+)\)", prose)
  quoted = re.findall(r"`([a-z_]+(?:/[a-z_0-9]+)+\.py)\b", prose)
  for link in links:
    assert (ROOT / name).parent.joinpath(link).exists(), link
  for path in quoted:
    folders = (ROOT, ROOT / "lorax_flax")
    assert any((folder / path).is_file() for folder in folders), path

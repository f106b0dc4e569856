"""Files beside a checkpoint's weights."""

import pytest

from lorax_flax.hub.checkpoints import beside


@pytest.mark.parametrize(
  ("name", "has"), [("tokenizer.json", True), ("m.gguf", True), ("README.md", False)]
)
def test_a_gguf_file_holds_its_tokenizer(name, has, tmp_path):
  (tmp_path / name).touch()
  assert beside.has_tokenizer(tmp_path) is has

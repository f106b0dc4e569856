import re

import huggingface_hub
import pytest

from lorax_flax.hub import card

NASTY = "<script>x</script> | *a* `b` _c_\n# d"


def _load(tmp_path, **given):
  values = {"title": "a", "data": {}, "facts": {}, "code": {}} | given
  file = tmp_path / "README.md"
  file.write_text(card.text(**values))
  return huggingface_hub.ModelCard.load(file)


def test_the_hub_reads_what_is_in_front_and_the_scores(tmp_path):
  data = {"base_model": "org/base", "library_name": "peft", "tags": ["lora"]}
  scores = {"accuracy": 0.5, "f1": 0.25}
  found = _load(tmp_path, data=data, scores=scores, dataset="my: data").data
  assert (found.base_model, found.library_name) == ("org/base", "peft")
  assert found.metrics == ["accuracy", "f1"]
  [first, second] = found.eval_results
  assert (first.metric_type, first.metric_value) == ("accuracy", 0.5)
  assert (second.metric_type, second.dataset_name) == ("f1", "my: data")


def test_a_card_without_an_evaluation_has_no_scores(tmp_path):
  found = _load(tmp_path, data={"library_name": "peft"})
  assert found.data.eval_results is None
  assert "Scores" not in found.text


def test_no_text_of_a_user_becomes_markup(tmp_path):
  found = _load(
    tmp_path,
    title=NASTY,
    data={"base_model": NASTY},
    facts={"Data": {"labels": NASTY}},
    code={"Load": "echo ```\n````\nend"},
    scores={"accuracy": 1.0},
    dataset=NASTY,
  )
  assert found.data.base_model == NASTY
  assert found.data.eval_results[0].dataset_name == NASTY
  assert not re.search(r"(?<!\\)<script", found.text)
  assert found.text.count("\n# ") == 1
  [line] = [x for x in found.text.splitlines() if x.startswith("| labels")]
  assert len(re.findall(r"(?<!\\)\|", line)) == 3
  assert "`````sh\necho ```\n````\nend\n`````" in found.text


@pytest.mark.parametrize(
  ("spec", "name"),
  [
    ("minilm", "sentence-transformers/all-MiniLM-L6-v2"),
    ("roberta_base", "FacebookAI/roberta-base"),
    ("org/model", "org/model"),
    ("some/folder/here", "some/folder/here"),
  ],
)
def test_the_base_has_its_name_on_the_hub(spec, name):
  assert card.base_model(spec) == name


@pytest.mark.parametrize(
  ("readme", "license"),
  [
    ("---\nlicense: mit\n---\n", {"license": "mit"}),
    (
      "---\nlicense: other\nlicense_name: mine\n---\n",
      {"license": "other", "license_name": "mine"},
    ),
    ("no front", {}),
    ("---\n: [\n---\n", {}),
    (None, {}),
  ],
)
def test_the_license_is_what_the_bases_own_card_states(tmp_path, readme, license):
  if readme is not None:
    (tmp_path / "README.md").write_text(readme)
  assert card.license_of(str(tmp_path), tmp_path) == license


def test_an_alias_brings_its_license(tmp_path):
  assert card.license_of("minilm", tmp_path) == {"license": "apache-2.0"}

"""What a job is made of, apart from a run (test_run.py)."""

import dataclasses
from types import SimpleNamespace

import pytest

from lorax_flax.errors import LoraxError
from lorax_flax.jobs import build, outline
from lorax_flax.models import registry
from lorax_flax.models.settings import ModelSettings
from lorax_flax.tasks import TASKS

RATES = {
  "bert": (
    ["hidden_dropout_prob", "attention_probs_dropout_prob"],
    "classifier_dropout",
  ),
  "distilbert": (["dropout", "attention_dropout"], "seq_classif_dropout"),
  "deberta-v2": (
    ["hidden_dropout_prob", "attention_probs_dropout_prob"],
    "cls_dropout",
  ),
  "gpt2": (["resid_pdrop", "embd_pdrop", "attn_pdrop"], None),
  "t5": (["dropout_rate"], None),
  "vit": (["hidden_dropout_prob", "attention_probs_dropout_prob"], None),
}


def _loaded(name):
  family = registry.FAMILIES[name]
  config = family.configure({"model_type": name})
  module = family.build(config, "float32", False, "none")
  return SimpleNamespace(
    family=family, module=module, config=config, hf_config={"model_type": name}
  )


@pytest.mark.parametrize("name", RATES)
def test_dropout_goes_by_each_familys_own_names(name):
  loaded = _loaded(name)
  inside, head = RATES[name]
  module = build.with_dropout(loaded, ModelSettings("there", dropout=0.4))
  want = dataclasses.replace(loaded.config, **dict.fromkeys(inside, 0.4))
  assert module.config == want
  module = build.with_dropout(loaded, ModelSettings("there"))
  assert module.config == loaded.config
  if head is not None:
    module = build.with_dropout(loaded, ModelSettings("there", head_dropout=0.3))
    assert module.config == dataclasses.replace(loaded.config, **{head: 0.3})


def test_a_rate_that_a_family_does_not_have_is_an_error():
  loaded = _loaded("gpt2")
  with pytest.raises(LoraxError, match=r"head_dropout is 0\.3, and a gpt2 has no such"):
    build.with_dropout(loaded, ModelSettings("there", head_dropout=0.3))


@pytest.mark.parametrize(
  ("names", "fits"),
  [
    (["ENTAILMENT", "NEUTRAL", "CONTRADICTION"], True),
    (["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], False),
    (["LABEL_0", "LABEL_1", "LABEL_2"], True),
  ],
)
def test_a_heads_labels_in_another_order_than_the_tasks_are_an_error(names, fits):
  id2label = {str(i): name for i, name in reversed(list(enumerate(names)))}
  check = lambda: outline.check(
    ModelSettings("there"),
    TASKS["mnli"],
    8,
    {"model_type": "bert", "id2label": id2label},
    "there",
  )
  if fits:
    assert check().config.num_labels == 3
  else:
    with pytest.raises(LoraxError, match=r"CONTRADICTION, NEUTRAL, .*mnli has entailm"):
      check()

import ast
import re

import pytest

from experiments.cli import config_dict, config_flag
from lorax_flax.tasks import task as tasks

# The LoRA paper's table 9: batch, epochs, learning rate × 1e-4, and length for large.
BASE = {
  "mnli": (16, 30, 5),
  "sst2": (16, 60, 5),
  "mrpc": (16, 30, 4),
  "cola": (32, 80, 4),
  "qnli": (32, 25, 4),
  "qqp": (16, 25, 5),
  "rte": (32, 80, 5),
  "stsb": (16, 40, 4),
}
LARGE = {
  "mnli": (4, 10, 3, 128),
  "sst2": (4, 10, 4, 128),
  "mrpc": (4, 20, 3, 512),
  "cola": (4, 20, 2, 128),
  "qnli": (4, 10, 2, 512),
  "qqp": (4, 20, 3, 512),
  "rte": (8, 20, 4, 512),
  "stsb": (8, 30, 2, 512),
}
# Its table 10, DeBERTa-XXL: batch, epochs, learning rate × 1e-4, weight decay, the
# classifier's dropout, length.
XXLARGE = {
  "mnli": (8, 5, 1, 0, 0.15, 256),
  "sst2": (8, 16, 0.6, 0.01, 0, 128),
  "mrpc": (32, 30, 2, 0.01, 0, 128),
  "cola": (4, 10, 1, 0, 0.1, 64),
  "qnli": (6, 8, 1, 0.01, 0.1, 512),
  "qqp": (8, 11, 1, 0.01, 0.2, 320),
  "rte": (4, 11, 2, 0.01, 0.2, 320),
  "stsb": (4, 10, 2, 0.1, 0.2, 128),
}
DAGGER_EPOCHS = {**{t: LARGE[t][1] for t in LARGE}, "stsb": 10}
# Table 2: RoBERTa-base LoRA, large LoRA, large LoRA†, DeBERTa-XXL LoRA.
SCORES = {
  "mnli": ("87.5 ± 0.3", "90.6 ± 0.2", "90.6", "91.9 ± 0.2"),
  "sst2": ("95.1 ± 0.2", "96.2 ± 0.5", "96.2", "96.9 ± 0.2"),
  "mrpc": ("89.7 ± 0.7", "90.9 ± 1.2", "90.2", "92.6 ± 0.6"),
  "cola": ("63.4 ± 1.2", "68.2 ± 1.9", "68.2", "72.4 ± 1.1"),
  "qnli": ("93.3 ± 0.3", "94.9 ± 0.3", "94.8", "96.0 ± 0.1"),
  "qqp": ("90.8 ± 0.1", "91.6 ± 0.1", "91.6", "92.9 ± 0.1"),
  "rte": ("86.6 ± 0.7", "87.4 ± 2.5", "85.2 ± 1.1", "94.9 ± 0.4"),
  "stsb": ("91.5 ± 0.2", "92.6 ± 0.2", "92.3", "93.0 ± 0.2"),
}
VARIANTS = ("", ":large", ":large_dagger", ":xxlarge")
TOKENS = (
  "llama3_8b_instruct",
  "llama3_70b_instruct",
  "mixtral_8x7b_instruct",
  "gpt3_175b",
)
E2E = ("e2e_gpt2_medium", "e2e_gpt2_large")
OWN = ("chat", "complete", "seq2seq")  # on text of one's own
SPECS = [
  "llama3_8b_qlora.py",
  "llama3_70b_qlora.py",
  *(f"quickstart.py{v}" for v in ("", ":full", ":bitfit")),
  *("classify.py", "classify.py:full"),
  *(f"{name}.py" for name in E2E),
  *("smollm2_e2e.py", "smollm2_e2e.py:full"),
  *(f"images.py{v}" for v in ("", ":full", ":digits", ":digits_base")),
  *(f"glue_{task}.py{v}" for task in BASE for v in VARIANTS),
  *(f"{name}.py{v}" for name in (*TOKENS, *OWN) for v in ("", ":full")),
]


def _settings(spec):
  return config_dict.convert(config_flag.load(spec))


def _docstring(name):
  text = config_flag.names()[name].read_text("utf-8")
  return ast.get_docstring(ast.parse(text))


def test_every_config_is_in_these_tests():
  assert {spec.partition(".")[0] for spec in SPECS} == set(config_flag.names())


@pytest.mark.parametrize("spec", SPECS)
def test_every_config_and_variant_validates(spec):
  found = _settings(spec)
  assert found.data.task in tasks.TASKS
  if spec.startswith("glue_"):
    assert found.data.task == spec.partition(".")[0].removeprefix("glue_")


@pytest.mark.parametrize("name", sorted(config_flag.names()))
def test_a_docstring_says_result_hardware_source_and_command(name):
  text = _docstring(name)
  assert "Hardware:" in text
  assert "Hyper-parameters:" in text
  assert f"python -m experiments.run --config={name}.py" in text
  variants = {spec.partition(":")[2] for spec in SPECS if spec.startswith(name)} - {""}
  assert set(re.findall(r"`:(\w+)`", text)) == variants


@pytest.mark.parametrize("task", sorted(BASE))
def test_the_papers_recipe_and_scores(task):
  text = _docstring(f"glue_{task}")
  for score in SCORES[task]:
    assert score in text
  base, large, dagger, _ = (_settings(f"glue_{task}.py{v}") for v in VARIANTS)
  found = (base.train.batch_size, base.train.epochs, base.train.learning_rate)
  batch, epochs, rate = BASE[task]
  assert found == (batch, epochs, pytest.approx(rate * 1e-4))
  assert (base.model.path, base.data.max_length) == ("FacebookAI/roberta-base", 512)
  assert (base.lora.rank, base.lora.alpha) == (8, 8)
  *_, length = LARGE[task]
  found = (large.train.batch_size, large.train.epochs, large.train.learning_rate)
  assert (*found, large.data.max_length) == (
    *LARGE[task][:2],
    pytest.approx(LARGE[task][2] * 1e-4),
    length,
  )
  assert (large.lora.rank, large.lora.alpha) == (8, 16)
  found = (dagger.train.batch_size, dagger.train.epochs, dagger.train.learning_rate)
  assert found == (4, DAGGER_EPOCHS[task], large.train.learning_rate)
  assert dagger.data.max_length == 128
  for each in (base, large, dagger):
    assert each.train.warmup_fraction == 0.06
    assert each.train.schedule == "linear"
    assert re.fullmatch(each.lora.targets, "encoder/layer_3/attention/query/kernel")
    assert re.fullmatch(each.lora.targets, "encoder/layers/attention/value/kernel")
    assert not re.fullmatch(each.lora.targets, "encoder/layer_3/attention/key/kernel")
    assert each.lora.tuned == ("classifier",)


@pytest.mark.parametrize("task", sorted(XXLARGE))
def test_the_papers_recipe_of_deberta_with_the_rank_of_its_4_7m(task):
  found = _settings(f"glue_{task}.py:xxlarge")
  model, lora, train = found.model, found.lora, found.train
  assert "rank 16 and alpha 32" in _docstring(f"glue_{task}")
  assert (
    train.batch_size,
    train.epochs,
    pytest.approx(train.learning_rate * 1e4),
    train.weight_decay,
    model.head_dropout,
    found.data.max_length,
  ) == XXLARGE[task]
  assert model.path == "microsoft/deberta-v2-xxlarge"
  assert (train.warmup_fraction, train.schedule) == (0.1, "linear")
  assert (lora.rank, lora.alpha, lora.tuned) == (16, 32, ("classifier",))
  query, value, key = (
    re.fullmatch(lora.targets, f"encoder/layers/attention/{name}_proj/kernel")
    for name in ("query", "value", "key")
  )
  assert query
  assert value
  assert not key


# Table 3 and table 11: BLEU, NIST, METEOR, ROUGE-L, CIDEr of LoRA; of full fine-tuning.
NLG = {
  "e2e_gpt2_medium": ("70.4 8.85 46.8 71.8 2.53", "68.2 8.62 46.2 71.0 2.47"),
  "e2e_gpt2_large": ("70.4 8.89 46.8 72.0 2.47", "68.5 8.78 46.0 69.9 2.45"),
}


@pytest.mark.parametrize("name", E2E)
def test_the_papers_recipe_and_scores_of_e2e(name):
  text = _docstring(name)
  for scores in NLG[name]:
    assert set(scores.split()) <= set(re.findall(r"[\d.]*\d", text))
  found = _settings(f"{name}.py")
  lora, train = found.lora, found.train
  assert (lora.method, lora.options) == (
    "fused_lora",
    {"enable_lora": (True, False, True)},
  )
  assert (lora.rank, lora.alpha, lora.dropout, lora.tuned) == (4, 32, 0.1, ())
  assert (train.batch_size, train.epochs, train.warmup_steps) == (8, 5, 500)
  assert (train.learning_rate, train.weight_decay) == (2e-4, 0.01)
  assert (train.label_smoothing, train.grad_clip) == (0.1, float("inf"))
  assert (train.schedule, train.optimizer) == ("linear", "adamw")
  assert (found.data.max_length, found.model.dropout) == (512, 0.0)
  assert re.fullmatch(lora.targets, "layer_3/attn/c_attn/kernel")
  assert not re.fullmatch(lora.targets, "layer_3/attn/c_proj/kernel")


def test_full_fine_tuning_is_the_quick_start_without_deltas():
  lora, full = _settings("quickstart.py"), _settings("quickstart.py:full")
  assert (lora.lora.targets, lora.lora.rank) == ("all-linear", 8)
  assert (full.lora.targets, full.lora.tuned) == ((), ".*")
  assert (lora.data, lora.model) == (full.data, full.model)
  assert lora.train.epochs == full.train.epochs

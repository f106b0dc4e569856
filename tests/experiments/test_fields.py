"""Flags, defaults and help come from the settings' dataclasses."""

import dataclasses

import pytest
from absl import flags

from experiments.cli import command, config_dict, config_flag, fields
from lorax_flax.adapt.config import LoraConfig
from lorax_flax.errors import LoraxError
from lorax_flax.jobs.settings import Settings


def _parse(*arguments):
  values = flags.FlagValues()
  config_flag.define(values)
  command.parse(values, ["run", *arguments])
  return config_flag.read(values)


def _lora(*arguments):
  return _parse("--config=quickstart.py", *arguments).settings().lora


def test_every_field_of_every_dataclass_is_a_config_field_with_help():
  sections = {"model", "data", "lora", "train", "mesh"}
  assert {field.name for field in dataclasses.fields(Settings)} >= sections
  for field in dataclasses.fields(LoraConfig):
    assert f"lora.{field.name}" in fields.known()
  assert [name for name, field in fields.known().items() if not field.help] == []
  text = config_flag.help_text([])
  headlines = fields.of_task("headlines")
  for name in fields.known():
    assert f"\n  {name} {'=' if name in headlines else '('}" in text
  assert (
    "\n  data.path (next_token, e2e, seq2seq, texts, images)\n"
    "      a file, or a folder with train." in text
  )
  assert "\n  data.path = None\n" in config_flag.help_text(["--config=gpt3_175b.py"])
  assert "lora.rank = 8\n      of every target, unless a pattern" in text


def test_a_default_is_the_dataclasss():
  config = config_dict.defaults()
  config.model.path, config.data.task, config.train.steps = "minilm", "headlines", 1
  settings = config_dict.convert(config)
  assert settings.lora == LoraConfig()
  assert settings.train == type(settings.train)(steps=1)
  assert settings.mesh == type(settings.mesh)()


@pytest.mark.parametrize(
  ("argument", "field", "value"),
  [
    ("layers=0,1", "layers", (0, 1)),
    ("layers=3", "layers", (3,)),
    ("layers_pattern=layer_(\\d+)/", "layers_pattern", "layer_(\\d+)/"),
    ("rank_pattern..*/query=4", "rank_pattern", {".*/query": 4}),
    ("rank_pattern..*/query=4,0", "rank_pattern", {".*/query": (4, 0)}),
    ("rank_pattern={'a.b=c': 2}", "rank_pattern", {"a.b=c": 2}),
    ("alpha_pattern.(query|value)=2", "alpha_pattern", {"(query|value)": 2.0}),
    ("rows.embeddings/word=3,4", "rows", {"embeddings/word": (3, 4)}),
    ("tuned_layers.encoder/x/bias=1", "tuned_layers", {"encoder/x/bias": (1,)}),
    ("stack_axes.experts/.*=0,1", "stack_axes", {"experts/.*": (0, 1)}),
    ("init=gaussian", "init", "gaussian"),
    ("init_options.rho=1.5", "init_options", {"rho": 1.5}),
    ("on_unsupported=materialize", "on_unsupported", "materialize"),
    ("use_rslora", "use_rslora", True),
    ("alpha=4", "alpha", 4.0),
  ],
)
def test_a_field_of_any_type_is_reached_by_a_flag(argument, field, value):
  needs = {"layers_pattern": ["layers=0"], "init_options": ["init=eva"]}
  extra = [f"--config.lora.{each}" for each in needs.get(field, ())]
  found = getattr(_lora(f"--config.lora.{argument}", *extra), field)
  assert found == value
  assert type(found) is type(value)


def test_the_method_is_reached_by_a_flag():
  assert _lora("--config.lora.method=dora") == _lora("--config.lora.use_dora")
  assert _lora("--config.lora.use_dora").method == "dora"
  assert _lora("--noconfig.lora.use_dora").method == "lora"


def test_an_override_may_come_before_the_config_and_several_entries_add_up():
  found = _parse(
    "--config.lora.rank_pattern.query=2",
    "--config.lora.rank_pattern.value=3",
    "--config.train.grad_clip",
    "inf",
    "--config=quickstart.py",
  )
  settings = found.settings()
  assert settings.lora.rank_pattern == {"query": 2, "value": 3}
  assert settings.train.grad_clip == float("inf")


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("lora.rnk_pattern.a=4", "did you mean 'lora.rank_pattern'"),
    (
      "lora.rank_pattern.a=many",
      "lora.rank_pattern.a can't be 'many': it takes int or",
    ),
    ("lora.rank=1.5", r"--config.lora.rank=1.5: config.lora.rank can't be 1.5: .* int"),
    ("lora.layers=a,b", "it takes ints or None"),
    (
      "model.hf_config.hidden_size=8",
      "unknown config field 'model.hf_config.hidden_size'",
    ),
    ("lora.method=dorra", "did you mean 'dora'"),
    ("lora.options.shared=true", "unknown option of lora 'shared'"),
    ("lora.init=gausian", "did you mean 'gaussian'"),
  ],
)
def test_a_flag_that_can_not_be_is_named(argument, message):
  with pytest.raises(LoraxError, match=message):
    _lora(f"--config.{argument}")


def test_a_documents_entries_are_changed_where_they_are():
  found = _parse("--config=gpt3_175b.py", "--config.model.hf_config.n_layer=2")
  shape = found.settings().model.hf_config
  assert (shape["n_layer"], shape["n_head"]) == (2, 96)


def test_a_documents_entries_are_nested_by_dots():
  values = config_flag.choose("quickstart.py").values
  rope = {"rope_scaling": {"factor": 2.0, "type": "linear"}}
  values = config_dict.change(values, "model.hf_config", rope)
  values = config_dict.change(values, "model.hf_config.rope_scaling.factor", 4.0)
  scaling = config_dict.value(values, "model.hf_config")["rope_scaling"]
  assert scaling == {"factor": 4.0, "type": "linear"}


def test_a_config_file_may_name_patterns(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "from experiments.configs import common\n"
    "def get_config():\n"
    "  config = common.base()\n"
    "  config.train.steps = 1\n"
    "  config.lora.rank_pattern['.*/query'] = 2\n"
    "  config.lora.layers = [0, 1]\n"
    "  return config\n"
  )
  lora = config_flag.choose(str(file)).settings().lora
  assert (lora.rank_pattern, lora.layers) == ({".*/query": 2}, (0, 1))

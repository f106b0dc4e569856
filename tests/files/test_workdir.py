import json

import numpy as np
import pytest

from lorax_flax.errors import LoraxError
from lorax_flax.files import strict_json, workdir

CONFIG = {"train": {"learning_rate": 0.001, "epochs": 3.0}, "lora": {"rank": 8}}


def test_the_same_config_may_go_on(tmp_path):
  workdir.claim(tmp_path / "a" / "run", CONFIG)
  workdir.claim(tmp_path / "a" / "run", json.loads(json.dumps(CONFIG)))
  assert json.loads((tmp_path / "a" / "run" / "config.json").read_text()) == CONFIG


def test_another_config_is_an_error_that_names_what_differs(tmp_path):
  workdir.claim(tmp_path, CONFIG)
  other = {"train": {"learning_rate": 0.002, "epochs": 3.0}, "lora": {"alpha": 1}}
  with pytest.raises(LoraxError) as error:
    workdir.claim(tmp_path, other)
  message = str(error.value)
  assert "train.learning_rate is 0.001 there and 0.002 here" in message
  assert "lora.rank is 8 there and null here" in message
  assert "epochs" not in message
  assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_tuples_are_the_lists_that_json_makes_of_them(tmp_path):
  workdir.claim(tmp_path, {"targets": ("query", "value")})
  workdir.claim(tmp_path, {"targets": ("query", "value")})


def test_a_file_in_the_way_is_an_error(tmp_path):
  (tmp_path / "run").write_text("")
  with pytest.raises(LoraxError, match="is a file, and a workdir is a folder"):
    workdir.claim(tmp_path / "run", CONFIG)


def test_a_broken_config_json_is_an_error(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(LoraxError, match=r"config\.json is not JSON"):
    workdir.claim(tmp_path, CONFIG)


def test_a_run_made_from_something_else_is_refused_by_name(tmp_path):
  made_from = {"base": "1", "data.train": "2"}
  workdir.claim(tmp_path, CONFIG)  # As runs before there were fingerprints.
  workdir.claim(tmp_path, CONFIG, made_from)
  workdir.claim(tmp_path, CONFIG, dict(made_from))
  for other in ({"data.train": "3"}, {"data.validation": "4"}):
    with pytest.raises(LoraxError, match=f"a run whose {next(iter(other))} was not"):
      workdir.claim(tmp_path, CONFIG, made_from | other)
  assert strict_json.read(tmp_path / "config.json")["fingerprints"] == made_from


def test_a_run_without_result_is_not_finished(tmp_path):
  assert workdir.result(tmp_path) is None
  workdir.write_json(tmp_path / "result.json", {"accuracy": 1.0})
  assert workdir.result(tmp_path) == {"accuracy": 1.0}


def test_a_number_that_is_not_finite_is_null_in_json(tmp_path):
  workdir.write_json(tmp_path / "result.json", {"a": [float("nan"), 1.5], "b": np.inf})
  assert strict_json.read(tmp_path / "result.json") == {"a": [None, 1.5], "b": None}

"""Compiled programs kept from one start to the next, and what a start makes of them."""

import contextlib
import json
import warnings

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.cli import config_dict, config_flag
from lorax_flax.errors import LoraxError
from lorax_flax.jobs import compile_cache
from tests.train import toy

_CHANGED = (
  "jax_compilation_cache_dir",
  "jax_compilation_cache_max_size",
  "jax_enable_compilation_cache",
  "jax_persistent_cache_min_compile_time_secs",
)


@contextlib.contextmanager
def _as_started(folder):
  """Nothing compiled in memory; yields one item a program that was found on disk.

  Args:
    folder: of programs; None is the user's own.
  """
  found = []
  listen = lambda event, **_: (
    found.append(event) if event.endswith("/cache_hits") else 0
  )
  before = {name: getattr(jax.config, name) for name in _CHANGED}
  jax.clear_caches()
  compilation_cache.reset_cache()
  jax.monitoring.register_event_listener(listen)
  try:
    jax.config.update("jax_enable_compilation_cache", True)
    compile_cache.use(None if folder is None else str(folder))
    yield found
  finally:
    jax.monitoring.unregister_event_listener(listen)
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def _train(folder):
  toy.fit(toy.job(folder), folder)
  return (folder / "metrics.jsonl").read_text(), (folder / "adapter.json").read_text()


def test_a_second_start_finds_its_programs_and_a_damaged_one_is_compiled_anew(
  tmp_path, monkeypatch
):
  # The tests' programs are compiled too quickly to be worth keeping.
  monkeypatch.setattr(compile_cache, "_WORTH_KEEPING", 0.0)
  with _as_started(tmp_path / "programs") as found:
    wanted = _train(tmp_path / "cold")
  assert not found
  programs = sorted((tmp_path / "programs").glob("*-cache"))
  steps = [program for program in programs if program.name.startswith("jit_step-")]
  assert len(steps) >= 2  # The steps of training and of evaluation.
  with _as_started(tmp_path / "programs") as found:
    assert _train(tmp_path / "warm") == wanted
  assert len(found) >= len(programs)

  for program in programs:
    content = program.read_bytes()
    program.write_bytes(content[: len(content) // 2])
  with (
    _as_started(tmp_path / "programs") as found,
    warnings.catch_warnings(record=True) as told,
  ):
    warnings.simplefilter("always")
    assert _train(tmp_path / "damaged") == wanted
  assert not found
  assert any(
    "Error reading persistent compilation cache" in str(w.message) for w in told
  )


def test_programs_are_kept_in_the_users_cache_which_is_bounded(tmp_path, monkeypatch):
  monkeypatch.setattr(compile_cache, "_WORTH_KEEPING", 0.0)
  monkeypatch.setenv("LORAX_FLAX_CACHE", str(tmp_path))
  with _as_started(None):
    double = jax.jit(lambda x: 2 * x).lower(1.0).compile()
    [program] = (tmp_path / "programs").glob("*-cache")
    # Room for two of the kind: the one that was used least recently goes.
    monkeypatch.setattr(compile_cache, "_MOST_BYTES", 5 * program.stat().st_size // 2)
  with _as_started(None) as found:
    for factor in (3, 2, 4):
      jax.jit(lambda x, by=factor: by * x).lower(1.0).compile()
    assert len(found) == 1
    left = [*(tmp_path / "programs").glob("*-cache")]
    assert len(left) == 2
    assert program in left
  assert double(1.0) == 2.0


def test_without_a_place_of_its_own_nothing_is_kept_and_the_run_goes_on(
  tmp_path, monkeypatch, caplog
):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("LORAX_FLAX_CACHE", str(tmp_path / "file"))
  with caplog.at_level("INFO"), _as_started(None):
    assert jax.config.jax_compilation_cache_dir is None
  assert "compiled programs are not kept" in caplog.text
  monkeypatch.setenv("LORAX_FLAX_CACHE", str(tmp_path / "unused"))
  with _as_started(tmp_path / "given"):
    compile_cache.use(None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "given")


def test_a_place_that_can_not_be_written_is_an_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match="file"):
    compile_cache.use(str(tmp_path / "file" / "programs"))
  with pytest.raises(LoraxError, match="only buckets gs://BUCKET/FOLDER are supported"):
    compile_cache.use("s3://bucket/programs")


def test_models_and_adapters_in_buckets_are_refused_by_name():
  for section, name in (("model", "path"), (None, "init_adapter")):
    config = config_flag.load("quickstart.py")
    with config.unlocked():
      (config[section] if section else config)[name] = "gs://bucket/x"
    with pytest.raises(LoraxError, match=f"{name} is gs://bucket/x: models and adapt"):
      config_dict.convert(config)


def test_a_run_may_go_on_with_another_place_for_its_programs():
  config = config_flag.load("quickstart.py")
  with config.unlocked():
    config.compilation_cache = "gs://bucket/programs"
  wanted = config_dict.convert(config)
  assert wanted.compilation_cache == "gs://bucket/programs"
  assert "programs" not in json.dumps(wanted.to_json())

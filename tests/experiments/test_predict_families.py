"""The predict and merge commands for every family, against transformers and peft."""

import json

import numpy as np
import pytest
import transformers

from experiments.inference import lines
from experiments.inference import logits as inference
from experiments.merge import merge
from experiments.predict import predict
from lorax_flax.errors import LoraxError
from lorax_flax.files import atomic
from lorax_flax.models import registry
from tests.experiments import peers

TOLERANCE = 1e-4
TEXTS = [
  "a man a plan a canal panama",
  "cat",
  "was it a cat i saw no lemon",
  "no melon",
]
IDS = [[0, 4, 5, 2], [9], [0, 6, 7, 8, 9, 10, 2, 11, 3, 14], [0, 7, 2, 8, 13]]
DECODER = [[0, 4], [0], [0, 5, 6, 7, 8, 9, 10, 11, 12, 13], [0, 3, 2]]
CLASSIFIERS = ("deberta-v2", "distilbert")
LANGUAGE = ("gpt2", "llama", "t5")


def _images(count=4):
  rng = np.random.default_rng(0)
  return [rng.normal(size=(3, 8, 8)).round(4).tolist() for _ in range(count)]


def _lines(family, kind):
  if kind == "pixels":
    return [{"pixel_values": image} for image in _images()]
  if kind == "texts":
    made = [{"text": text} for text in TEXTS]
  else:
    made = [{"input_ids": ids} for ids in IDS]
    made[2]["attention_mask"] = [1] * 8 + [0] * 2
  if family == "t5":
    for line, ids in zip(made, DECODER, strict=True):
      line["decoder_input_ids"] = ids
  return made


def _write(file, rows):
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(file)


def _predict(folder, rows, tmp_path, **options):
  adapter = str(folder / "adapter")
  source, out = _write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
  assert predict(str(folder / "base"), adapter, source, str(out), **options) == len(
    rows
  )
  return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Each family's base, adapter and PEFT model, made when first asked for."""
  found = {}

  def make(family):
    if family not in found:
      folder = tmp_path_factory.mktemp(family)
      model = peers.tiny(family, folder / "base")
      found[family] = folder, peers.adapt(model, folder / "adapter")
    return found[family]

  return make


def _wanted(family, folder, adapted, rows):
  tokenizer = None
  if "text" in rows[0]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
  return peers.logits(adapted, rows, tokenizer)


def _last(family, row, wanted):
  seen = np.flatnonzero(row.get("attention_mask", [1] * len(wanted)))
  return wanted[-1 if family == "t5" else seen[-1]]


@pytest.mark.parametrize(
  ("family", "kind"),
  [(family, kind) for family in LANGUAGE for kind in ("texts", "ids")]
  + [(family, kind) for family in CLASSIFIERS for kind in ("texts", "ids")]
  + [("vit", "pixels")],
)
def test_logits_are_pefts_in_order(made, family, kind, tmp_path):
  folder, adapted = made(family)
  rows = _lines(family, kind)
  results = _predict(folder, rows, tmp_path, batch_size=3)
  wanted = _wanted(family, folder, adapted, rows)
  if family in LANGUAGE:
    assert all(result.keys() == {"logits"} for result in results)
    wanted = [_last(family, *pair) for pair in zip(rows, wanted, strict=True)]
  else:
    assert [r["label"] for r in results] == [f"LABEL_{row.argmax()}" for row in wanted]
  got = np.array([result["logits"] for result in results])
  np.testing.assert_allclose(got, wanted, atol=TOLERANCE)
  assert np.ptp(wanted, axis=0).min() > 0.01, "a wrong order would not show"


@pytest.mark.parametrize("family", LANGUAGE)
def test_all_positions_are_those_of_the_line_and_none_of_the_padding(
  made, family, tmp_path
):
  folder, adapted = made(family)
  rows = _lines(family, "ids")
  results = _predict(folder, rows, tmp_path, batch_size=2, all_positions=True)
  wanted = _wanted(family, folder, adapted, rows)
  for row, result, logits in zip(rows, results, wanted, strict=True):
    mask = [1] * len(logits) if family == "t5" else row.get("attention_mask")
    for place, (got, want) in enumerate(zip(result["logits"], logits, strict=True)):
      if mask is not None and not mask[place]:
        assert got is None
      else:
        np.testing.assert_allclose(got, want, atol=TOLERANCE)


def test_small_batches_and_windows_give_the_same_in_the_same_order(
  made, monkeypatch, tmp_path
):
  folder, _ = made("gpt2")
  rows = _lines("gpt2", "ids") * 3
  want = _predict(folder, rows, tmp_path, batch_size=64)
  monkeypatch.setattr(inference, "_WINDOW", 2)
  assert _close(_predict(folder, rows, tmp_path, batch_size=2), want)
  # As if a vocabulary's logits of two rows were all that there is room for.
  monkeypatch.setattr(inference, "_MOST_BYTES", 2 * 4 * 24 * 16)
  assert _close(_predict(folder, rows, tmp_path, batch_size=64), want)
  loaded = registry.load(folder / "base")
  known = lines.names(loaded.family, loaded.config)
  made_rows = lines.rows(rows, loaded, known, None)
  assert inference._sizes(made_rows, loaded, 16, 64, True) == (2, 2)


def _close(got, want):
  pairs = zip(got, want, strict=True)
  return all(np.allclose(a["logits"], b["logits"], atol=1e-5) for a, b in pairs)


GOOD = {
  "gpt2": {"input_ids": [0, 4]},
  "t5": {"input_ids": [0, 4], "decoder_input_ids": [0]},
  "vit": {"pixel_values": _images(1)[0]},
}


@pytest.mark.parametrize(
  ("family", "line", "says"),
  [
    ("gpt2", {"pixel_values": [1]}, "unknown name 'pixel_values'"),
    ("gpt2", {"input_ids": [0], "token_type_ids": [0]}, "unknown name 'token_type"),
    ("gpt2", {"input_ids": [0], "decoder_input_ids": [0]}, "unknown name 'decoder"),
    ("gpt2", {"input_ids": [24]}, "24, and goes from 0 to 23"),
    ("gpt2", {"input_ids": [4] * 23}, "23 tokens, and at most 22"),
    ("t5", {"input_ids": [0]}, "no 'decoder_input_ids'"),
    ("t5", {"decoder_input_ids": [0]}, 'either "text" or "input_ids"'),
    ("t5", {"input_ids": [0], "decoder_input_ids": []}, "missing or empty"),
    ("t5", {"input_ids": [0], "decoder_input_ids": [[0]]}, "integers"),
    ("t5", {"input_ids": [0], "decoder_input_ids": [24]}, "24, and goes from 0"),
    ("t5", {"input_ids": [0], "decoder_input_ids": 3}, "a list"),
    ("vit", {"text": "a"}, "unknown name 'text'"),
    ("vit", {}, 'wants "pixel_values"'),
    ("vit", {"pixel_values": [[1.0], [1.0, 2.0]]}, "different lengths"),
    ("vit", {"pixel_values": [[["a"]]]}, "not a number"),
    ("vit", {"pixel_values": None}, "not a number"),
    ("vit", {"pixel_values": [[[10**400]]]}, "not a number"),
    ("vit", {"pixel_values": [[[True]]]}, "not a number"),
    ("vit", {"pixel_values": [[[0.5]]]}, r"shape \(1, 1, 1\).*takes \(3, 8, 8\)"),
    ("vit", {"pixel_values": [[[1e300] * 8] * 8] * 3}, "not finite"),
  ],
)
def test_a_bad_line_is_named_and_nothing_is_written(made, family, line, says, tmp_path):
  folder, _ = made(family)
  source = _write(tmp_path / "in.jsonl", [GOOD[family], GOOD[family], line])
  with pytest.raises(LoraxError, match=f"line 3.*{says}"):
    predict(str(folder / "base"), None, source, str(tmp_path / "out.jsonl"))
  assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_number_that_json_has_not_is_a_bad_line(made, tmp_path):
  folder, _ = made("vit")
  source = tmp_path / "in.jsonl"
  source.write_text('{"pixel_values": [[[NaN]]]}')
  with pytest.raises(LoraxError, match="line 1 is not JSON: NaN"):
    predict(str(folder / "base"), None, str(source), str(tmp_path / "out"))


@pytest.mark.parametrize(
  ("family", "options", "says"),
  [
    ("vit", {"all_positions": True}, "a vit has no positions"),
    ("vit", {"max_length": 3}, "takes no text"),
    ("gpt2", {"max_length": 23}, "takes 22 tokens"),
  ],
)
def test_an_option_that_means_nothing_is_refused(made, family, options, says, tmp_path):
  folder, _ = made(family)
  source = _write(tmp_path / "in.jsonl", [GOOD[family]])
  with pytest.raises(LoraxError, match=says):
    predict(str(folder / "base"), None, source, str(tmp_path / "out"), **options)


@pytest.mark.parametrize("family", [*CLASSIFIERS, *LANGUAGE, "vit"])
def test_transformers_loads_the_merged_checkpoint_to_the_same_logits(
  made, family, tmp_path
):
  folder, adapted = made(family)
  out = tmp_path / "out"
  merge(str(folder / "base"), str(folder / "adapter"), str(out))
  kind = getattr(transformers, peers.FAMILIES[family][1])
  merged, info = kind.from_pretrained(out, output_loading_info=True)
  assert not any(info.values()), "transformers misses or doesn't know a key"
  rows = _lines(family, "pixels" if family == "vit" else "ids")
  got = peers.logits(merged.eval(), rows)
  for mine, wanted in zip(got, peers.logits(adapted, rows), strict=True):
    np.testing.assert_allclose(mine, wanted, atol=TOLERANCE)
  names = {path.name for path in (folder / "base").iterdir()}
  names |= {atomic.MANIFEST, "README.md", "receipt.json"}
  assert {path.name for path in out.iterdir()} == names

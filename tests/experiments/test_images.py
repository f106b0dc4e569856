"""Images through the commands: a user's own, and the digits from a model made here."""

import json
import warnings

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from experiments import data as show
from experiments import predict, run
from experiments.cli import config_flag
from lorax_flax.errors import LoraxError
from lorax_flax.hub import small_vit
from lorax_flax.jobs.abstract import abstract
from tests.experiments import commands, peers
from tests.train.stopping import interrupt

CLASSES = ("dark", "light", "striped")
STEPS = 40


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("base")
  peers.tiny("vit", folder)
  ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
  return folder


def _image(label, rng):
  low, high = {"dark": (0, 90), "light": (160, 256), "striped": (0, 256)}[label]
  pixels = rng.integers(low, high, (10, 12, 3)).astype(np.uint8)
  if label == "striped":
    pixels[::4], pixels[1::4] = 255, 255
  return Image.fromarray(pixels)


def _write(folder, count=30, seed=0):
  """Images by class; the paths, and labels, of a file beside them."""
  rng, lines = np.random.default_rng(seed), ["file,kind,note"]
  for number in range(count):
    label = CLASSES[number % 3]
    file = folder / label / f"{number}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    _image(label, rng).save(file)
    lines.append(f"{label}/{number}.png,{label},x")
  return "\n".join(lines) + "\n"


def _splits(folder):
  for seed, name in enumerate(("train", "validation")):
    _write(folder / name, 30 - 18 * seed, seed)
  return folder


def _settings(base, data, spec="images.py", **changes):
  fields = {
    "model.path": base,
    "data.path": data,
    "lora.rank": 2,
    "train.steps": STEPS,
    "train.batch_size": 8,
    "train.learning_rate": 0.02,
    "train.log_steps": 1,
    **changes,
  }
  texts = {name: str(x) for name, x in fields.items() if x is not None}
  return config_flag.choose(spec, texts).settings()


class Trained:
  def __init__(self, base, folder):
    self.base, self.data = base, _splits(folder / "data")
    self.settings = _settings(base, self.data)
    self.workdir = folder / "run"
    self.result = run.run(self.settings, self.workdir)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
  return Trained(base, tmp_path_factory.mktemp("images"))


def _peer_logits(trained):
  """PEFT's logits of the images held out, by transformers' processor; and classes."""
  model = transformers.AutoModelForImageClassification.from_pretrained(
    trained.base, num_labels=3
  )
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's, about its own options
    model = peft.PeftModel.from_pretrained(model, trained.workdir / "adapter").eval()
  processor = ViTImageProcessorPil.from_pretrained(trained.base)
  files = sorted((trained.data / "validation").rglob("*.png"))
  images = [load_image(str(file)) for file in files]
  pixels = processor(images, return_tensors="pt")["pixel_values"]
  with torch.no_grad():
    logits = model(pixel_values=pixels).logits.numpy()
  return pixels.numpy(), logits, [CLASSES.index(file.parent.name) for file in files]


def test_folders_of_classes_train_and_peft_has_the_accuracy(trained):
  _, logits, labels = _peer_logits(trained)
  assert trained.result["accuracy"] > 0.8
  assert trained.result["accuracy"] == pytest.approx(
    np.mean(logits.argmax(-1) == labels)
  )
  loss = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
  assert trained.result["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)
  confusion = trained.result["report"]["confusion"]
  assert confusion["labels"] == list(CLASSES)
  assert np.sum(confusion["rows"]) == trained.result["examples_evaluated"] == 12
  assert trained.result["macro_f1"] == trained.result["report"]["macro_f1"]
  assert trained.result["images_per_second"] > 0
  assert (trained.workdir / "confusion.png").is_file()
  labels = json.loads((trained.workdir / "adapter/labels.json").read_text())
  assert labels == list(CLASSES)


def test_the_adapter_predicts_through_the_command(trained, tmp_path):
  pixels, logits, _ = _peer_logits(trained)
  rows = [json.dumps({"pixel_values": image.tolist()}) + "\n" for image in pixels]
  source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  source.write_text("".join(rows))
  adapter = str(trained.workdir / "adapter")
  predict.predict(str(trained.base), adapter, str(source), str(out))
  found = list(map(json.loads, out.read_text().splitlines()))
  np.testing.assert_allclose([x["logits"] for x in found], logits, atol=1e-4)
  assert [x["label"] for x in found] == [CLASSES[i] for i in logits.argmax(-1)]


def test_report_and_card_say_how_to_load_it(trained):
  report = (trained.workdir / "report.html").read_text()
  card = (trained.workdir / "adapter/README.md").read_text()
  for text in (report, card):
    assert "AutoModelForImageClassification" in text
    assert "num_labels=3" in text
    assert "images" in text
    assert "padded lengths" not in text
  assert "pipeline_tag: image-classification" in card


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(trained, tmp_path):
  interrupt(trained.settings, tmp_path, after=20)
  run.run(trained.settings, tmp_path)
  for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
    assert (tmp_path / name).read_bytes() == (trained.workdir / name).read_bytes()


def test_paths_in_a_csv_make_the_same_rows_as_folders(base, tmp_path):
  text = _write(tmp_path / "images")
  for name in ("train", "validation"):
    (tmp_path / "images" / f"{name}.csv").write_text(text)
    _write(tmp_path / "folders" / name)
  columns = {"data.columns.image": "file", "data.columns.label": "kind"}
  files, folders = (
    run.prepare({tmp_path: settings}).data.evaluation["validation"]
    for settings in (
      _settings(base, tmp_path / "images", **columns),
      _settings(base, tmp_path / "folders"),
    )
  )
  # Files are in the order of their lines, folders in that of their names.
  order = sorted(range(30), key=lambda i: (CLASSES[i % 3], f"{i}.png"))
  found, expected = (
    dict(zip(batch["index"], batch["pixel_values"], strict=True))
    for [batch] in (files, folders)
  )
  for place, number in enumerate(order):
    np.testing.assert_array_equal(found[number], expected[place])


def test_batches_are_what_transformers_makes_of_the_files(trained):
  pixels, _, labels = _peer_logits(trained)
  job = run.prepare({trained.workdir: trained.settings})
  [batch] = job.data.evaluation["validation"]
  real = batch["index"] >= 0
  assert batch["pixel_values"].dtype == np.float32
  np.testing.assert_array_equal(batch["labels"][real], labels)
  np.testing.assert_allclose(batch["pixel_values"][real], pixels, atol=1e-6)
  assert not batch["pixel_values"][~real].any()


def test_what_is_read_is_shown(base, tmp_path):
  shown = "\n".join(show.describe(_settings(base, _splits(tmp_path))))
  for line in (
    "images with labels, of the columns image, label; not read: none",
    "rows: 30 in train, 12 in validation",
    "labels: 3 classes",
    "  striped: 10 in train, 4 in validation",
    "images: 12 × 10 pixels; the model takes 8 × 8",
    "example: dark/0.png -> dark",
  ):
    assert line in shown


def test_lorax_data_knows_the_task_by_the_model(base, tmp_path):
  folder = _splits(tmp_path)
  done = commands.run(
    "experiments.cli.main", "data", str(folder), f"--config.model.path={base}"
  )
  assert done.returncode == 0, done.stderr
  assert "images: 12 × 10 pixels; the model takes 8 × 8" in done.stdout


def test_the_step_is_compiled_without_a_checkpoint(base, tmp_path):
  job = abstract(_settings(base, _splits(tmp_path)), jax.devices()[:1])
  assert job.batch["pixel_values"].shape == (8, 3, 8, 8)
  job.lower()


def _break(name):
  return lambda folder: (folder / name).write_bytes(b"no image")


@pytest.mark.parametrize(
  ("change", "fields", "message"),
  [
    (_break("train/dark/0.png"), {}, r"train: dark/0.png: .*0.png can't be read as an"),
    (lambda x: _write(x / "validation/x"), {}, "no row to train on has the class 'x'"),
    (None, {"data.path": None}, "data.path: which folder with a folder of images"),
    (None, {"data.path": "nowhere"}, "unknown ending ''"),
    (None, {"data.max_length": 64}, "data.max_length is of texts"),
    (None, {"data.buckets": 2}, "data.buckets is of texts"),
    (None, {"model.path": "minilm"}, "images trains a image-classification model"),
  ],
)
def test_what_can_not_be_is_an_error(base, tmp_path, change, fields, message):
  data = _splits(tmp_path / "data")
  if change:
    change(data)
  if fields.get("model.path"):
    peers.tiny("bert", tmp_path / "bert")
    fields = {"model.path": tmp_path / "bert"}
  with pytest.raises(LoraxError, match=message):
    run.prepare({tmp_path: _settings(base, data, **fields)})


def test_what_is_no_image_is_skipped_and_counted(base, tmp_path):
  data = _splits(tmp_path)
  for name in ("train/dark/0.png", "train/light/1.png", "train/light/notes.txt"):
    (data / name).write_bytes(b"no image")
  shown = "\n".join(show.describe(_settings(base, data, **{"data.bad_rows": "skip"})))
  for line in (
    "1 rows are skipped: is no image: unknown ending '.txt'",
    "(the first: dark/0.png)",
    "(the first: light/1.png)",
    "  light: 9 in train, 4 in validation",
  ):
    assert line in shown
  assert shown.count(" rows are skipped: ") == 3


def test_one_class_alone_is_an_error(base, tmp_path):
  for name in ("train", "validation"):
    (tmp_path / name / "dark").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / name / "dark/0.png")
  with pytest.raises(LoraxError, match=r"needs two classes.* 'dark' alone"):
    run.prepare({tmp_path: _settings(base, tmp_path)})


def test_a_missing_file_is_named_with_its_line(base, tmp_path):
  (tmp_path / "my.csv").write_text(_write(tmp_path))
  (tmp_path / "light/4.png").unlink()
  columns = {"data.columns.image": "file", "data.columns.label": "kind"}
  with pytest.raises(LoraxError, match=r"my\.csv: line 6: no file .*light/4\.png"):
    run.prepare({tmp_path: _settings(base, tmp_path / "my.csv", **columns)})


def test_a_processor_of_another_size_than_the_models_is_an_error(tmp_path):
  peers.tiny("vit", tmp_path / "base")
  ViTImageProcessorPil(size={"height": 9, "width": 8}).save_pretrained(
    tmp_path / "base"
  )
  settings = _settings(tmp_path / "base", _splits(tmp_path / "data"))
  with pytest.raises(LoraxError, match=r"makes images of \(3, 9, 8\), and the model"):
    run.prepare({tmp_path: settings})


def test_the_digits_train_a_small_vit_that_is_adapted_to_others(tmp_path, monkeypatch):
  monkeypatch.setenv("LORAX_FLAX_CACHE", str(tmp_path / "cache"))
  steps = {"train.steps": 120, "train.batch_size": 32, "train.log_steps": 40}
  changes = {"model.path": None, "data.path": None, "lora.rank": None}
  changes |= {"train.learning_rate": None, "model.scan": True}  # Compiles faster.
  settings = _settings(None, None, "images.py:digits_base", **(changes | steps))
  result = run.run(settings, tmp_path / "base")
  assert result["examples_evaluated"] == 181
  assert result["accuracy"] > 0.6  # By chance 0.2.
  body = transformers.AutoModelForImageClassification.from_pretrained(
    tmp_path / "base/model"
  )
  assert body.config.id2label == {i: str(i) for i in range(5)}
  changes["model.path"] = tmp_path / "base/model"
  settings = _settings(None, None, "images.py:digits", **(changes | steps))
  result = run.run(settings, tmp_path / "digits")
  assert result["report"]["confusion"]["labels"] == ["5", "6", "7", "8", "9"]
  assert result["examples_evaluated"] == 180
  assert result["accuracy"] > 0.5
  assert result["trained_parameters"] < 60_000


def test_the_small_vit_is_a_checkpoint_of_transformers(tmp_path, monkeypatch):
  monkeypatch.setenv("LORAX_FLAX_CACHE", str(tmp_path))
  folder = small_vit.path()
  model, info = transformers.ViTModel.from_pretrained(
    folder, output_loading_info=True, add_pooling_layer=False
  )
  assert not any(info[name] for name in ("missing_keys", "unexpected_keys"))
  assert sum(p.numel() for p in model.parameters()) == 136_000
  assert small_vit.path() == folder

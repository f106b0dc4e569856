"""Images from files, against transformers' processor of ViT."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lorax_flax.data import image_processor
from lorax_flax.errors import LoraxError

SETTINGS = {
  "its own": {},
  "small": {
    "size": {"height": 9, "width": 14},
    "resample": 3,
    "image_mean": [0, 0.1, 1],
  },
  "a number": {"size": 11, "image_std": [0.2, 0.3, 0.7], "rescale_factor": 0.01},
  "as they are": {"do_resize": False, "do_normalize": False},
  "no rescaling": {"do_rescale": False, "size": {"height": 8, "width": 8}},
}


def _pixels(*shape):
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _rotated(file):
  exif = Image.Exif()
  exif[0x0112] = 6  # a quarter to the right
  Image.fromarray(_pixels(12, 17, 3)).save(file, exif=exif)


def _palette(file):
  Image.fromarray(_pixels(12, 17, 3)).quantize(16).save(file, transparency=3)


FILES = {
  "rgb.png": lambda file: Image.fromarray(_pixels(23, 17, 3)).save(file),
  "rgb.jpg": lambda file: Image.fromarray(_pixels(40, 61, 3)).save(file),
  "rgba.png": lambda file: Image.fromarray(_pixels(12, 17, 4)).save(file),
  "grey.png": lambda file: Image.fromarray(_pixels(12, 17)).save(file),
  "grey with alpha.png": lambda file: (
    Image.fromarray(_pixels(12, 17, 4)).convert("LA").save(file)
  ),
  "bits.png": lambda file: Image.fromarray(_pixels(12, 17)).convert("1").save(file),
  "palette.png": _palette,
  "cmyk.jpg": lambda file: (
    Image.fromarray(_pixels(12, 17, 3)).convert("CMYK").save(file)
  ),
  "rotated.jpg": _rotated,
}


def _folder(folder, **fields):
  (folder / image_processor.FILE).write_text(json.dumps(fields))
  return folder


def _compare(tmp_path, file, fields):
  processor = image_processor.load(_folder(tmp_path, **fields))
  image = image_processor.read_image(file)
  got = processor.normalization(processor.resized(image))
  peer = ViTImageProcessorPil(**fields)
  [want] = peer(load_image(str(file)), return_tensors="np")["pixel_values"]
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_every_mode_is_read_as_transformers_reads_it(tmp_path, name):
  FILES[name](tmp_path / name)
  _compare(tmp_path, tmp_path / name, {"size": {"height": 10, "width": 13}})


@pytest.mark.parametrize("name", SETTINGS)
def test_images_are_those_of_transformers(tmp_path, name):
  FILES["rgb.jpg"](tmp_path / "x.jpg")
  _compare(tmp_path, tmp_path / "x.jpg", SETTINGS[name])


def _deep(file):
  Image.fromarray(np.full((4, 4), 700, np.uint16)).save(file)


@pytest.mark.parametrize(
  ("write", "message"),
  [
    (lambda file: None, r"no file .*x\.png"),
    (lambda file: file.write_bytes(b"none"), r"x\.png can't be read as an image"),
    (lambda file: file.write_bytes(b""), r"x\.png can't be read as an image"),
    (_deep, r"x\.png has more than 8 bits a channel \(mode I;16\)"),
  ],
)
def test_a_file_that_is_no_image_of_8_bits_is_named(tmp_path, write, message):
  write(tmp_path / "x.png")
  with pytest.raises(LoraxError, match=message):
    image_processor.read_image(tmp_path / "x.png")


def test_an_image_that_is_cut_off_is_named(tmp_path):
  file = tmp_path / "x.png"
  FILES["rgb.png"](file)
  file.write_bytes(file.read_bytes()[:300])
  with pytest.raises(LoraxError, match=r"x\.png can't be read as an image"):
    image_processor.read_image(file)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"image_processor_type": "ViTImageProcesor"}, "did you mean 'ViTImageProcessor'"),
    ({"do_center_crop": True}, "do_center_crop is not built here"),
    ({"size": {"shortest_edge": 8}}, "size is a height and a width here, not"),
    ({"size": {"height": 0, "width": 8}}, "size is a height and a width here, not"),
    ({"resample": 9}, "resample is one of 0, 1, 2, 3, 4, 5.*, not 9"),
    ({"rescale_factor": "a"}, "rescale_factor is a number, not 'a'"),
    ({"image_mean": [1, 2]}, "image_mean is a number for each of 3 channels"),
  ],
)
def test_settings_that_are_not_built_are_named(tmp_path, fields, message):
  with pytest.raises(LoraxError, match=f"preprocessor_config.json: .*{message}"):
    image_processor.load(_folder(tmp_path, **fields))


def test_a_folder_without_settings_is_named(tmp_path):
  with pytest.raises(LoraxError, match=r"no preprocessor_config.json in "):
    image_processor.load(tmp_path)

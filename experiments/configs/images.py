"""Your own images with labels: a ViT with rank-16 LoRA on all linear layers.

DATA is a folder with a folder of images for each class (cat/1.png, dog/2.jpg), of which
a tenth is held out; one with such folders in train/ and validation/; or a file (CSV,
JSON lines, …) with the columns image, a path from the file's folder, and label. Images
are resized and normalised by the model's preprocessor_config.json. ViT-B/16, pretrained
on ImageNet-21k, is fetched from the hub; another ViT by --config.model.path=MODEL.

Two variants need neither hub nor data: `:digits_base` trains a small ViT (0.1M
parameters, random at first) in full to tell scikit-learn's digits 0 to 4 apart, and
`:digits` adapts it, frozen, to the digits 5 to 9.

Expected: what your data allows. Held-out accuracy on the digits: `:digits_base` 0.989
of 181 images, `:digits` 0.983 of 180.

Hardware: for the digits 2 CPU cores, which take a minute for each; a GPU for
ViT-B/16.
Command:
  python -m experiments.run --config=images.py --config.data.path=DATA
  python -m experiments.run --config=images.py:digits_base --workdir=runs/digits_base
  python -m experiments.run --config=images.py:digits \
    --config.model.path=runs/digits_base/model

Hyper-parameters: rank 16 on every linear layer, at ten times the learning rate of full
fine-tuning, as "LoRA Without Regret" recommends. `:full` trains all weights instead.
"""

from ml_collections import ConfigDict

from experiments.configs import common


def get_config(variant: str | None = None) -> ConfigDict:
  change = common.choose("images", variant, _VARIANTS)
  config = common.base()
  config.model.path = "google/vit-base-patch16-224-in21k"
  config.data.task = "images"
  config.lora.targets = "all-linear"
  config.lora.rank = 16
  config.lora.alpha = 32.0
  config.train.epochs = 3.0
  config.train.batch_size = 32
  config.train.learning_rate = 2e-3
  config.train.warmup_fraction = 0.06
  change(config)
  return config


def _full(config: ConfigDict) -> None:
  common.train_in_full(config, 2e-4)


def _digits(config: ConfigDict) -> None:
  config.model.path = "runs/digits_base/model"
  config.data.task = "digits_5_9"
  config.train.epochs = 20.0


def _digits_base(config: ConfigDict) -> None:
  common.train_in_full(config, 1e-3)
  config.model.path = "small_vit"
  config.data.task = "digits_0_4"
  config.train.epochs = 16.0


_VARIANTS = {
  "": lambda config: None,
  "full": _full,
  "digits": _digits,
  "digits_base": _digits_base,
}

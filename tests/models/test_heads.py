"""Heads, as each family's key map describes them, against the model itself."""

import pytest

from lorax_flax.adapt.paths import flatten
from lorax_flax.hub.checkpoints import keymap as km
from lorax_flax.models import registry

LAYERS = {"distilbert": "n_layers", "gpt2": "n_layer", "t5": "num_layers"}


def outline(family):
  layers = LAYERS.get(family, "num_hidden_layers")
  return registry.outline({"model_type": family, layers: 1})


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_the_key_map_knows_the_leaves_that_have_an_axis_of_labels(family):
  model = outline(family)
  axes = flatten(model.family.logical_axes(model.module))
  assert model.keymap.label_paths == {
    p for p, names in axes.items() if names[-1:] == ("labels",)
  }
  assert bool(model.keymap.label_paths) == model.family.has_labels


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_only_a_head_of_labels_may_be_new(family):
  keymap = outline(family).keymap
  assert bool(keymap.heads) == bool(keymap.label_paths)
  assert keymap.label_paths <= {
    path for paths in keymap.heads.values() for path in paths
  }


def test_the_number_of_labels_is_read_from_shapes():
  keymap = outline("roberta").keymap
  shapes = {"classifier.dense.weight": (24, 24), "classifier.out_proj.weight": (5, 24)}
  assert km.num_labels(keymap, shapes) == 5
  assert km.num_labels(keymap, {"classifier.dense.weight": (24, 24)}) is None
  assert km.num_labels(outline("gpt2").keymap, {"score.weight": (5, 24)}) is None

"""Where adapters lie: in sub-folders of their names, and in files of old."""

import copy
import pickle
import warnings

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

import lorax_flax as lx
from lorax_flax.hub.adapters import any as adapters
from lorax_flax.hub.peft import folder as hub_peft
from tests.hub.peft import peers

QUERY = {"task_type": "SEQ_CLS", "target_modules": ["query"]}


@pytest.fixture(scope="module")
def bert():
  return peers.tiny_classifier("bert")


@pytest.fixture(scope="module")
def base(bert):
  keymap = peers.bert_keymap(bert)
  return peers.params(bert, keymap), keymap


@pytest.fixture
def two(bert, tmp_path):
  """A folder of peft with two named adapters and none of its own."""
  model = peers.adapted(bert, name="fr", bias="all", **QUERY)
  model.add_adapter("de", peft.LoraConfig(r=2, **QUERY))
  return peers.save(model, tmp_path / "two")


def test_a_named_adapter_is_read_by_its_name_or_by_its_folder(base, two):
  by_name, config = hub_peft.read_adapter(two, *base, name="fr")
  by_folder, _ = hub_peft.read_adapter(two / "fr", *base)
  other, _ = hub_peft.read_adapter(two, *base, name="de")
  assert config.rank == 4
  assert next(iter(other.values())).rank == 2
  for path, delta in by_name.items():
    assert type(delta) is type(by_folder[path])
  assert hub_peft.from_peft(two, base[1], name="de").rank == 2
  assert hub_peft.stored_dtypes(two, name="fr").keys() == set(
    load_file(two / "fr" / peers.WEIGHTS)
  )


def test_named_adapters_come_back_under_their_names(bert, base, two, tmp_path):
  for name in ("fr", "de"):
    adapter, config = hub_peft.read_adapter(two, *base, name=name)
    hub_peft.write_adapter(
      tmp_path / "ours",
      adapter,
      base[1],
      config,
      name=name,
      dtypes=hub_peft.stored_dtypes(two, name=name),
    )
    peers.same_tensors(tmp_path / "ours" / name, two / name)
  with torch.no_grad(), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.PeftModel.from_pretrained(
      copy.deepcopy(bert), tmp_path / "ours/fr", adapter_name="fr"
    )
    model.load_adapter(tmp_path / "ours/de", adapter_name="de")
  assert set(model.peft_config) == {"fr", "de"}


def test_a_folder_of_named_adapters_says_which_there_are(base, two):
  with pytest.raises(lx.LoraxError, match=r"in sub-folders: de, fr\. Give"):
    hub_peft.read_adapter(two, *base)
  with pytest.raises(lx.LoraxError, match="unknown adapter 'fa'; did you mean 'fr'"):
    hub_peft.read_adapter(two, *base, name="fa")
  with pytest.raises(lx.LoraxError, match="holds named adapters: de, fr"):
    adapters.read(two, *base)


def test_an_old_bin_is_read_to_the_same_adapter(bert, base, tmp_path):
  folder = peers.save(peers.adapted(bert, **QUERY), tmp_path / "peft")
  want, _ = hub_peft.read_adapter(folder, *base)
  tensors = load_file(folder / peers.WEIGHTS)
  (folder / peers.WEIGHTS).unlink()
  torch.save(tensors, folder / "adapter_model.bin")
  got, _ = hub_peft.read_adapter(folder, *base)
  assert got.keys() == want.keys()
  for path, delta in want.items():
    for name in delta.trained:
      np.testing.assert_array_equal(getattr(got[path], name), getattr(delta, name))
  assert hub_peft.needs(folder, base[1]).num_labels == 3
  assert set(hub_peft.stored_dtypes(folder).values()) == {"float32"}


class Evil:
  def __reduce__(self):
    return exec, ("raise SystemExit('it ran')",)


def test_an_old_bin_runs_nothing(bert, base, tmp_path):
  folder = peers.save(peers.adapted(bert, **QUERY), tmp_path / "peft")
  (folder / peers.WEIGHTS).unlink()
  for write in (pickle.dump, lambda x, file: torch.save(x, file)):
    with (folder / "adapter_model.bin").open("wb") as file:
      write({"lora_A": Evil()}, file)
    with pytest.raises(lx.LoraxError, match=r"adapter_model\.bin"):
      hub_peft.read_adapter(folder, *base)


def test_an_adapter_goes_by_way_of_our_own_form_to_the_same_bytes(bert, base, tmp_path):
  model = peers.adapted(
    bert,
    trainable_token_indices=[3, 1],
    use_dora=True,
    task_type="SEQ_CLS",
    target_modules=["query"],
  )
  folder = peers.save(model.to(torch.bfloat16), tmp_path / "peft")
  saved = adapters.read(folder, *base)
  adapters.orbax_adapter.write_adapter(tmp_path / "orbax", saved)
  again = adapters.read(tmp_path / "orbax", *base)
  hub_peft.write_adapter(
    tmp_path / "ours",
    again.adapter,
    base[1],
    again.config,
    task_type=again.task_type,
    dtypes=again.dtypes,
  )
  peers.same_tensors(tmp_path / "ours", folder)
  assert set(again.dtypes.values()) == {"bfloat16"}

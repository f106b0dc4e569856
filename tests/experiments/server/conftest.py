"""A tiny language model with two adapters, served in this process."""

import json

import pytest
import transformers
from starlette.testclient import TestClient

from experiments.inference import writers
from experiments.server import app, start
from lorax_flax.models import registry
from lorax_flax.serve import generate as generation
from lorax_flax.serve.settings import Decoding
from tests.experiments import own_text, peers

TEMPLATE = (
  "{% if tools %}{% for t in tools %}{{ '<|start|>' + t.function.name }}{% endfor %}"
  "{% endif %}" + own_text.UNMARKED
)
ADAPTERS = {
  "first": {"r": 3, "target_modules": ["q_proj", "down_proj"]},
  "second": {
    "r": 5,
    "lora_dropout": 0.5,
    "target_modules": ["v_proj", "o_proj", "down_proj"],
  },
}
SETTINGS = {
  "rows": 3,
  "length": 128,
  "waiting": 32,
  "seconds": 60.0,
  "capacity": 3,
  "max_rank": 8,
  "chat_template": None,
}


@pytest.fixture(scope="package")
def root(tmp_path_factory):
  """A folder with a base and a folder of adapters."""
  root = tmp_path_factory.mktemp("server")
  base = root / "tiny"
  own_text.decoder(base, TEMPLATE)
  model = transformers.LlamaForCausalLM.from_pretrained(base)
  for name, options in ADAPTERS.items():
    peers.adapt(model, root / "adapters" / name, modules_to_save=None, **options)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
  config = json.loads((base / "config.json").read_text())
  (base / "config.json").write_text(
    json.dumps(config | {"max_position_embeddings": 4096})
  )
  (base / "generation_config.json").write_text("{}")
  return root


def language(root, **settings):
  """What `lorax serve` makes of the folders."""
  loaded = registry.load(root / "tiny")
  own = {**SETTINGS, **settings}
  return start.served(loaded, "tiny", root / "adapters", language=own)


@pytest.fixture(scope="package")
def served(root):
  made = language(root)
  yield made
  made.close()


@pytest.fixture(scope="package")
def client(served):
  return TestClient(app.create(served))


@pytest.fixture(scope="package")
def alone(root):
  """The greedy text that a name writes after a prompt, by `generate`."""
  made = {}

  def write(name, prompt, new):
    if name not in made:
      adapter = None if name == "tiny" else str(root / "adapters" / name)
      made[name], _ = writers.load(str(root / "tiny"), adapter)
    writer = made[name]
    ids = writer.tokenizer.encode(prompt, add_special_tokens=True).ids
    found = generation.generate(writer, [ids], Decoding(max_new_tokens=new))
    return next(found)[1].text

  return write

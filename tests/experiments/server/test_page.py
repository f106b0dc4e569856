"""The page, in a real browser: two models side by side."""

import contextlib
import json
import threading

import pytest
import uvicorn

from experiments.server import app, start
from lorax_flax.models import registry
from tests.experiments import peers
from tests.experiments.server import browser as browsers

pytestmark = [
  pytest.mark.skipif(browsers.BINARY is None, reason="there is no Chromium"),
]


@contextlib.contextmanager
def _listening(application):
  """The address of a server in a thread of this process."""
  config = uvicorn.Config(application, port=0, log_level="error", lifespan="off")
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run)
  thread.start()
  while not server.started:
    pass
  try:
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
  finally:
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  with browsers.browser(tmp_path_factory.mktemp("browser")) as made:
    yield made


def _ask(browser, prompt, *models):
  choose = "".join(
    f"document.querySelectorAll('select')[{i}].value = {json.dumps(name)};"
    for i, name in enumerate(models)
  )
  browser.run(
    f"{choose} document.getElementById('prompt').value = {json.dumps(prompt)};"
    "document.getElementById('ask').click()"
  )
  browser.until("!document.getElementById('ask').disabled")
  texts = "[...document.querySelectorAll('{}')].map(x => x.textContent)"
  return [browser.run(texts.format(name)) for name in (".answer", ".speed")]


def test_two_adapters_answer_the_same_side_by_side(browser, served, alone):
  with _listening(app.create(served, ["secret"])) as url:
    browser.open(url)
    message = browser.until("document.getElementById('status').textContent")
    assert message.startswith("no such API key")
    browser.run(
      "document.getElementById('key').value = 'secret';"
      "document.getElementById('key').dispatchEvent(new Event('change'));"
      "document.getElementById('tokens').value = 12"
    )
    browser.until("document.querySelectorAll('option').length === 6")
    answers, speeds = _ask(browser, "five six", "first", "second")
    assert answers == [alone(name, "five six", 12) for name in ("first", "second")]
    assert all("12 tokens, " in speed and "a second" in speed for speed in speeds)
    wrong, _ = _ask(browser, "one " * 500, "tiny", "first")
    assert all("there is room for" in text for text in wrong)


def test_a_classifier_shows_each_labels_score(browser, tmp_path):
  model = peers.tiny("bert", tmp_path / "labels", names=peers.NAMES)
  peers.adapt(model, tmp_path / "adapters/one")
  loaded = registry.load(tmp_path / "labels")
  own = start.served(loaded, "labels", tmp_path / "adapters", language={"waiting": 9})
  with _listening(app.create(own)) as url:
    browser.open(url)
    browser.until("document.querySelectorAll('option').length === 4")
    assert browser.run("document.querySelector('.texts').hidden")
    text = "was it a cat i saw"
    answers, _ = _ask(browser, text, "labels", "one")
  for name, shown in zip(("labels", "one"), answers, strict=True):
    found = own.scores(name, [text])
    pairs = zip(found.labels, found.scores_NxC[0].tolist(), strict=True)
    ordered = sorted(pairs, key=lambda pair: -pair[1])
    assert shown == "".join(f"{label} {score:.3f}" for label, score in ordered)

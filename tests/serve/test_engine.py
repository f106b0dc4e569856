"""Continuous batching: each text as if it were alone, and what ends one."""

import dataclasses
import queue
import threading

import jax
import numpy as np
import pytest

from lorax_flax.errors import LoraxError
from lorax_flax.serve import bank, decoder, history, rules, slots
from lorax_flax.serve import generate as generation
from lorax_flax.serve.adapters import Adapters
from lorax_flax.serve.bank import Alone, Bank
from lorax_flax.serve.engine import Engine
from lorax_flax.serve.request import Busy, Closed, Request, TimedOut
from lorax_flax.serve.settings import Decoding
from lorax_flax.serve.waiting import Waiting
from tests.serve import talker as talkers

RNG = np.random.default_rng(0)
LENGTH = 64


FORMS = {"looped": {}, "scanned": {"scan": True}, "windowed": {"window": 8}}


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
  return _ending(talkers.make(tmp_path_factory.mktemp("talker")))


def _ending(writer):
  """The writer, its greedy texts ending at a token that it often writes."""
  found = generation.generate(writer, [[5, 6, 7], [9]], Decoding(max_new_tokens=12))
  ends = dataclasses.replace(writer.ends, eos=(dict(found)[0].ids[6],))
  return dataclasses.replace(writer, ends=ends)


@pytest.fixture(scope="module", params=FORMS)
def of_form(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp(request.param)
  return _ending(talkers.make(folder, **FORMS[request.param]))


@pytest.fixture(scope="module")
def engine(talker):
  made = Engine(talker, Alone(talker.params), rows=3, length=LENGTH, waiting=20)
  yield made
  made.close()


class Answer:
  """The pieces of one request as they come."""

  def __init__(self, engine, request):
    self._pieces = queue.Queue()
    self.running = engine.submit(request, self._pieces.put)

  def all(self):
    found = [self._pieces.get(timeout=60)]
    while found[-1].finish is None:
      found.append(self._pieces.get(timeout=60))
    return found

  def first(self):
    return self._pieces.get(timeout=60)


def _alone(writer, request):
  prompts = [[1]] * request.number + [list(request.prompt)]
  found = generation.generate(writer, prompts, request.decoding, batch_size=1)
  return dict(found)[request.number]


def _requests(writer):
  """Requests of unequal lengths and settings: greedy, sampled, stopped, penalised."""
  settings = [
    Decoding(max_new_tokens=20),
    Decoding(max_new_tokens=1),
    Decoding(max_new_tokens=20, temperature=0.7, top_p=0.9, top_k=50, seed=1),
    Decoding(max_new_tokens=20, repetition_penalty=1.5, no_repeat_ngram=2),
    Decoding(max_new_tokens=20, temperature=1.0, seed=4, stop=("e",)),
  ]
  prompts = [RNG.integers(3, 500, n).tolist() for n in (5, 33, 12, 1, 7)]
  prompts[0] = [5, 6, 7]
  return [
    Request(prompt, decoding, writer.tokenizer, number=int(decoding.seed == 4))
    for prompt, decoding in zip(prompts, settings, strict=True)
  ]


def test_each_text_is_that_of_its_request_alone(of_form):
  engine = Engine(of_form, Alone(of_form.params), rows=8, length=LENGTH)
  requests = _requests(of_form)
  answers = [[Answer(engine, request) for request in requests] for _ in range(2)]
  finishes = set()
  for request, *both in zip(requests, *answers, strict=True):
    alone = _alone(of_form, request)
    for pieces in (answer.all() for answer in both):
      assert tuple(piece.id for piece in pieces) == alone.ids
      assert "".join(piece.text for piece in pieces) == alone.text
      is_full = len(alone.ids) == request.decoding.max_new_tokens
      assert pieces[-1].finish == ("length" if is_full else "stop")
      finishes.add(pieces[-1].finish)
  assert finishes == {"stop", "length"}
  engine.close()


def test_a_step_has_the_rows_that_write_and_no_others(talker):
  asked = []

  class Seen(Alone):
    def of(self, slots):
      asked.append(len(slots))
      return super().of(slots)

  endless = dataclasses.replace(talker, ends=generation.Ends())
  engine = Engine(endless, Seen(talker.params), rows=16, length=LENGTH)
  for count, most in ((1, 2), (2, 2), (3, 16)):
    request = Request([5, 6], Decoding(max_new_tokens=10), talker.tokenizer)
    asked.clear()
    begin = threading.Event()
    engine.call(begin.wait)
    answers = [Answer(engine, request) for _ in range(count)]
    begin.set()
    alone = _alone(endless, request).ids
    for answer in answers:
      assert tuple(piece.id for piece in answer.all()) == alone
    assert max(asked) == most
  engine.close()


def test_a_step_of_some_rows_leaves_the_others_as_they_are(of_form):
  """Rows of which the last wrote more than a window has places."""
  begun = slots.blank(of_form.model, 3, LENGTH)
  for row, tokens in enumerate((4, 9, 20)):
    prompt = RNG.integers(3, 500, tokens).tolist()
    inputs = decoder.prompts([prompt], most=LENGTH)
    blank = of_form.model.blank_cache(1, inputs["input_ids"].shape[1])
    logits, cache = of_form.decoder.prefill(of_form.params, inputs, blank)
    begun, _ = slots.admit(
      begun,
      np.int32(row),
      logits,
      cache,
      history.of([prompt], LENGTH),
      rules.of([Decoding(max_new_tokens=20)], np.array([0])),
      np.array([], np.int32),
    )

  def after(chosen):
    copy = jax.tree.map(lambda x: x.copy(), begun)
    ends = np.array([], np.int32), np.zeros(len(chosen), bool)
    rows = np.array(chosen, np.int32)
    return slots.advance(of_form.decoder.step, of_form.params, copy, rows, *ends)

  everything, all_tokens = after([0, 1, 2])
  some, tokens = after([0, 2])
  np.testing.assert_array_equal(tokens.ids_B, all_tokens.ids_B[np.array([0, 2])])

  def of_row(found, row):
    carry = found.carry
    own = carry.history, carry.ids_B, carry.new_B, carry.done_B
    return jax.tree.leaves(
      (carry.state.take(np.array([row])), [x[row] for x in jax.tree.leaves(own)])
    )

  for row, expected in ((0, everything), (1, begun), (2, everything)):
    for x, y in zip(of_row(some, row), of_row(expected, row), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_request_that_does_not_fit_is_refused_at_once(talker, engine):
  for prompt, decoding, message in (
    ([1] * 60, Decoding(max_new_tokens=5), "60 tokens, and up to 5 .* room for 64"),
    ([], Decoding(), "the prompt has no tokens"),
    ([1], Decoding(beams=2), "beams=2: a search"),
  ):
    with pytest.raises(LoraxError, match=message):
      engine.submit(Request(prompt, decoding, talker.tokenizer), print)


def test_a_cancelled_text_frees_its_row(talker):
  endless = dataclasses.replace(talker, ends=generation.Ends())
  engine = Engine(endless, Alone(talker.params), rows=1)
  long = Request([3], Decoding(max_new_tokens=1000), talker.tokenizer)
  assert engine.length > 1001
  first = Answer(engine, long)
  first.first()
  second = Answer(
    engine, dataclasses.replace(long, decoding=Decoding(max_new_tokens=2))
  )
  first.running.cancel()
  assert second.all()[-1].finish == "length"
  assert engine.running == 0
  assert len(first._pieces.queue) < 900
  engine.close()


def _held(talker, **options):
  """An engine of one row whose thread waits, and the event that lets it go on."""
  engine, event = (
    Engine(talker, Alone(talker.params), rows=1, length=LENGTH, **options),
    threading.Event(),
  )
  engine.call(event.wait)
  return engine, event


def test_what_waits_is_bounded_and_a_closed_engine_ends_it(talker):
  engine, event = _held(talker, waiting=2)
  request = Request([3], Decoding(max_new_tokens=3), talker.tokenizer)
  answers = [Answer(engine, request) for _ in range(2)]
  with pytest.raises(Busy, match="2 requests are waiting"):
    Answer(engine, request)
  closing = threading.Thread(target=engine.close)
  closing.start()
  while not engine._closed:
    pass
  with pytest.raises(Closed):
    Answer(engine, request)
  event.set()
  closing.join()
  assert all(len(answer.all()) == 3 for answer in answers)


def test_a_request_that_waits_too_long_ends_with_an_error(talker):
  engine, event = _held(talker, seconds=0.05)
  late = Answer(engine, Request([3], Decoding(max_new_tokens=3), talker.tokenizer))
  threading.Timer(0.2, event.set).start()
  (piece,) = late.all()
  assert isinstance(piece.error, TimedOut)
  engine.close()


def test_a_failed_step_ends_its_texts_and_no_others(talker, caplog):
  failing = threading.Event()

  class Failing(Alone):
    def of(self, slots):
      if failing.is_set() and len(slots) > 1:
        raise RuntimeError("no memory")
      return super().of(slots)

  engine = Engine(talker, Failing(talker.params), rows=2, length=LENGTH)
  request = Request([3], Decoding(max_new_tokens=5), talker.tokenizer)
  failing.set()
  assert "server's log says why" in str(Answer(engine, request).all()[-1].error)
  failing.clear()
  ids = tuple(piece.id for piece in Answer(engine, request).all())
  assert ids == _alone(talker, request).ids
  assert "no memory" in caplog.text
  engine.close()


def test_a_listener_that_fails_harms_no_other_text(talker, engine, caplog):
  request = Request([3], Decoding(max_new_tokens=5), talker.tokenizer)

  def listener(piece):
    raise ConnectionError("gone")

  engine.submit(request, listener)
  assert len(Answer(engine, request).all()) == len(_alone(talker, request).ids)
  assert "gone" in caplog.text


def test_shares_wait_in_turns():
  waiting = Waiting(6)
  for share, item in ("a1", "a2", "a3", "a4", "b1", "c1"):
    waiting.put(share, share + item)
  assert waiting.full
  waiting.drop(lambda item: item == "a2")
  taken = [waiting.take() for _ in range(6)]
  assert taken == ["a1", "b1", "c1", "a3", "a4", None]


SYSTEM = [*range(100, 134)]  # 34 tokens: with what follows read as 64, or 16


def test_prompts_that_begin_alike_are_read_once(of_form):
  engine = Engine(of_form, Alone(of_form.params), rows=3, length=LENGTH)
  ask = lambda *rest: Request(
    [*SYSTEM, *rest], Decoding(max_new_tokens=8), of_form.tokenizer
  )
  first = ask(5, 6)
  answer = tuple(piece.id for piece in Answer(engine, first).all())
  assert answer == _alone(of_form, first).ids
  assert engine.reused == 0
  # What has ended, and what is being written; the same again; and the turn after it.
  requests = [ask(5, 7), ask(9), first, ask(5, 6, *answer, 11, 12)]
  answers = [Answer(engine, request) for request in requests]
  for request, found in zip(requests, answers, strict=True):
    ids = tuple(piece.id for piece in found.all())
    assert ids == _alone(of_form, request).ids
  is_ring = engine._slots.carry.state.columns < LENGTH
  expected = 35 + 34 + 35 + 36  # less a prompt's last token
  assert (engine.reused == 0) if is_ring else (engine.reused >= expected - 1)
  engine.close()


def test_no_adapter_reads_what_another_computed(talker):
  loaded = talker.model
  many, shapes = bank.slots(loaded, 3, 2), bank.all_linear(loaded, 2)
  rng = np.random.default_rng(5)
  draw = lambda: jax.tree.map(
    lambda x: (0.5 * rng.normal(size=x.shape)).astype(x.dtype), shapes
  )
  empty = many.empty(loaded.params, shapes)
  adapters = Adapters(many, loaded.params, empty, host_bytes=1 << 24)
  params = Bank(loaded.params, adapters)
  mixed = decoder.decoder_of(loaded, decoder.many(loaded))
  writer = dataclasses.replace(talker, decoder=mixed)
  for name in "ab":
    adapters.add(name, draw())
  decoding = Decoding(max_new_tokens=6)
  ask = lambda name: Request([*SYSTEM, 5], decoding, talker.tokenizer, name)

  def fresh(name):
    engine = Engine(writer, params, rows=3, length=LENGTH)
    ids = [piece.id for piece in Answer(engine, ask(name)).all()]
    engine.close()
    return ids

  engine = Engine(writer, params, rows=3, length=LENGTH)
  run = lambda name: [piece.id for piece in Answer(engine, ask(name)).all()]
  texts = [run(name) for name in ("a", "b", None)]
  assert engine.reused == 0
  assert len({*map(tuple, texts)}) == 3
  assert run("a") == texts[0] == fresh("a")
  assert engine.reused == len(SYSTEM)
  # Another adapter of the same name.
  engine.call(lambda: adapters.add("a", draw())).result()
  replaced = run("a")
  assert engine.reused == len(SYSTEM)
  assert replaced == fresh("a") != texts[0]
  assert run("b") == texts[1]
  engine.close()

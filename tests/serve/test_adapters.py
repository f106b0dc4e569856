"""Adapters loaded, replaced and evicted while a base is served."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_flax as lx
from lorax_flax.serve.adapters import Adapters, SlotsInUse
from tests import compiles
from tests.adapt import checks

PARAMS = {"up": jnp.full((4, 5), 0.3), "down": jnp.full((5, 3), 0.2)}
X = jnp.arange(8.0).reshape(2, 4)
ONE = 4 * (4 * 2 + 2 * 5) + 4  # bytes of a LoRA of rank 2 on up


def fn(params, x):
  return jnp.tanh(x @ params["up"]) @ params["down"]


def adapter(seed, rank=2, targets=("up",)):
  lora = lx.adapt(fn, lx.LoraConfig(rank=rank, targets=list(targets)))
  return checks.perturbed(lora.init(jax.random.key(seed), PARAMS, X), seed)


class Server:
  """Two slots, and what is computed with them."""

  def __init__(self, **tiers):
    self.lora = lx.adapt(fn, lx.LoraConfig())
    self.many = lx.many(self.lora, capacity=2, max_rank=4)
    slots = self.many.empty(PARAMS, adapter(0, targets=("up", "down")))
    tiers = {"host_bytes": 1 << 20, **tiers}
    self.adapters = Adapters(self.many, PARAMS, slots, **tiers)
    self.apply = jax.jit(self.many.apply)

  def answer(self, slot):
    ids = np.array([slot, -1], np.int32)
    return self.apply(PARAMS, self.adapters.slots, ids, X)[0]

  def check(self, name, expected):
    """The adapter of this name answers as it does alone."""
    slot = self.adapters.acquire(name)
    alone = self.lora.apply(PARAMS, expected, X)[0]
    np.testing.assert_allclose(self.answer(slot), alone, atol=1e-5)
    self.adapters.release(slot)


def test_more_adapters_than_slots_take_turns_and_nothing_is_compiled():
  server = Server()
  given = {
    f"{rank} {'+'.join(targets)}": adapter(rank, rank, targets)
    for rank in (1, 2, 3, 4)
    for targets in (("up",), ("down",), ("up", "down"))
  }
  # Each kernel's program to write a slot, and to clear one.
  for targets in (("up",), ("down",)):
    server.adapters.add("first", adapter(9, 2, targets))
    server.check("first", adapter(9, 2, targets))
  with compiles.counted() as found:
    for name, each in given.items():
      server.adapters.add(name, each)
      slot = server.adapters.acquire(name)
      server.answer(slot)
      server.adapters.release(slot)
  assert not found
  assert server.adapters.names == sorted([*given, "first"])
  for name, each in given.items():
    server.check(name, each)


def test_a_slot_in_use_is_not_given_to_another_and_the_least_recently_used_is():
  server = Server()
  adapters = server.adapters
  for i, name in enumerate("abc"):
    adapters.add(name, adapter(i))
  a, b = adapters.acquire("a"), adapters.acquire("b")
  with pytest.raises(SlotsInUse, match="all 2 slots"):
    adapters.acquire("c")
  assert adapters.acquire("a") == a
  adapters.release(a)
  adapters.release(b)
  with pytest.raises(lx.LoraxError, match=f"slot {b} is not in use"):
    adapters.release(b)
  assert adapters.acquire("c") == b  # a has a use left
  adapters.release(b)
  adapters.release(a)
  adapters.release(adapters.acquire("a"))
  assert adapters.acquire("b") == b  # c was used before a


def test_one_that_is_replaced_or_removed_stays_for_those_that_use_it():
  server = Server()
  server.adapters.add("a", adapter(1))
  slot = server.adapters.acquire("a")
  before = server.answer(slot)
  server.adapters.add("a", adapter(2))
  server.check("a", adapter(2))
  np.testing.assert_array_equal(server.answer(slot), before)
  server.adapters.remove("a")
  np.testing.assert_array_equal(server.answer(slot), before)
  with pytest.raises(lx.LoraxError, match="unknown adapter 'a'"):
    server.adapters.acquire("a")
  server.adapters.release(slot)
  server.adapters.add("b", adapter(3))
  server.check("b", adapter(3))


def test_what_leaves_the_host_is_on_disk_and_then_gone(tmp_path):
  server = Server(host_bytes=2 * ONE, folder=tmp_path, disk_bytes=1 << 20)
  for i, name in enumerate("abcd"):
    server.adapters.add(name, adapter(i))
  assert len(list(tmp_path.iterdir())) == 2
  for i, name in enumerate("abcd"):
    server.check(name, adapter(i))
  assert server.adapters.names == [*"abcd"]
  server.adapters.remove("a")
  assert len(list(tmp_path.iterdir())) == 3

  size = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
  room = tmp_path / "small"
  # Of one and a half: Orbax writes a folder in one small file more, or less.
  server = Server(host_bytes=2 * ONE, folder=room, disk_bytes=size // 2)
  for i, name in enumerate("abcde"):
    server.adapters.add(name, adapter(i))
  assert server.adapters.names == [*"cde"]
  assert len(list(room.iterdir())) == 1
  with pytest.raises(lx.LoraxError, match=r"unknown adapter 'a'.*There are: c, d, e"):
    server.adapters.acquire("a")
  server.check("c", adapter(2))


def test_one_with_a_source_is_read_again_and_never_written(tmp_path):
  server, read = Server(host_bytes=ONE, folder=tmp_path), []

  def source(i):
    return lambda: read.append(i) or adapter(i)

  for i, name in enumerate("abc"):
    server.adapters.add(name, adapter(i), source(i))
  for _ in range(2):
    for i, name in enumerate("abc"):
      server.check(name, adapter(i))
  assert server.adapters.names == [*"abc"]
  assert read == [0, 1, 2, 0, 1, 2]
  assert not list(tmp_path.iterdir())


def test_one_that_does_not_fit_is_an_error_and_the_older_one_stays():
  server = Server()
  server.adapters.add("a", adapter(1))
  with pytest.raises(lx.LoraxError, match="'up' has factors of rank 5"):
    server.adapters.add("a", adapter(2, rank=5))
  odd = {"side": adapter(1)["up"]}
  with pytest.raises(lx.LoraxError, match="unknown path of the slots 'side'"):
    server.adapters.add("b", odd)
  assert server.adapters.names == ["a"]
  server.check("a", adapter(1))

"""What targets mean where a model is no plain stack of layers, and what is shown."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.ode import odeint

import lorax_flax as lx
from tests.adapt.checks import check_equals_merged, perturbed


@pytest.fixture(autouse=True)
def promotion():
  """Programs of other people's, who do not keep to our strict promotion."""
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def plan(fn, params, *args, **config):
  return lx.adapt(fn, lx.LoraConfig(rank=2, **config)).plan(params, *args)


def paths(*given, **config):
  return [t.path for t in plan(*given, **config).targets]


X = normal(1, 3, 6)


# A kernel that another parameter flows into.


def decoder(p, x):
  x = jnp.concatenate([p["tokens"], x])
  x = x + jnp.tanh(x @ p["l0"]["q_proj"])
  x = x + jnp.tanh(x @ p["l1"]["q_proj"])
  return x @ p["head"]


def scanned_decoder(p, x):
  x = jnp.concatenate([p["tokens"], x])
  step = lambda x, w: (x + jnp.tanh(x @ w), None)
  return jax.lax.scan(step, x, p["layers"])[0] @ p["head"]


def resampler(p, x):
  """Learned queries that only later are added to."""
  q, k = p["tokens"] @ p["q_proj"], x @ p["k_proj"]
  y = p["tokens"] + jax.nn.softmax(q @ k.T) @ x
  return y @ p["head"]


DECODER = {
  "tokens": normal(2, 1, 6), "l0": {"q_proj": normal(3, 6, 6)},
  "l1": {"q_proj": normal(4, 6, 6)}, "head": normal(5, 6, 2),
}  # fmt: skip
RESAMPLER = {
  "tokens": normal(2, 2, 6), "q_proj": normal(3, 6, 6), "k_proj": normal(4, 6, 6),
  "head": normal(5, 6, 2),
}  # fmt: skip
SCANNED = {
  "tokens": normal(2, 1, 6), "layers": 0.3 * normal(3, 2, 6, 6), "head": normal(5, 6, 2)
}  # fmt: skip


@pytest.mark.parametrize(
  ("fn", "params", "suffixes", "expected"),
  [
    (decoder, DECODER, ["q_proj"], ["l0/q_proj", "l1/q_proj"]),
    (scanned_decoder, SCANNED, ["layers"], ["layers"]),
    (resampler, RESAMPLER, ["q_proj", "k_proj"], ["k_proj", "q_proj"]),
  ],
)
def test_a_kernel_that_learned_tokens_flow_into_is_a_target(
  fn, params, suffixes, expected
):
  assert paths(fn, params, X, targets=suffixes) == expected
  lora = lx.adapt(fn, lx.LoraConfig(rank=2))
  adapter = lora.init(jax.random.key(0), params, X)
  assert sorted(adapter) == expected
  check_equals_merged(lora, fn, params, perturbed(adapter), X)


def test_a_product_of_two_kernels_is_no_ones():
  fn = lambda p, x: jnp.tanh(x @ p["c"]) @ (p["u"] @ p["v"]) + x
  params = {"u": normal(2, 6, 2), "v": normal(3, 2, 6), "c": normal(4, 6, 6)}
  found = plan(fn, params, X)
  assert [t.path for t in found.targets] == ["c"]
  assert "left out: u (6, 2): used by 'dot_general'" in str(found)
  with pytest.raises(lx.LoraxError, match="product of two adapted weights"):
    plan(fn, params, X, targets=["u", "v"])


# The output head.

ATTENTION = {n: normal(i, 6, 6) for i, n in enumerate("qkvo")} | {
  "head": normal(9, 6, 2)
}


def attend(returned):
  def fn(p, x):
    q, k, v = (x @ p[n] for n in "qkv")
    y = jax.nn.softmax(q @ k.T) @ v @ p["o"]
    logits = (x + y) @ p["head"]
    return {
      "logits": logits,
      "cache": (logits, (k, v)),
      "sown": (logits, {"attention": y}),
      "loss": (logits, (logits**2).sum() + (q**2).mean()),
      "ids": jnp.argmax(logits, -1),
    }[returned]

  return fn


@pytest.mark.parametrize("returned", ["logits", "cache", "sown", "loss", "ids"])
def test_what_is_returned_beside_the_logits_is_no_head(returned):
  found = plan(attend(returned), ATTENTION, X)
  assert [t.path for t in found.targets] == ["k", "o", "q", "v"]
  assert found.heads == ("head",)


def batch_norm(p, x, running):
  h = x @ p["up"]
  mean, var = h.mean(0), h.var(0)
  new = {k: 0.9 * running[k] + 0.1 * n for k, n in (("mean", mean), ("var", var))}
  return jax.nn.relu((h - mean) / jnp.sqrt(var + 1e-5)) @ p["head"], new


def rnn(p, xs):
  def step(h, x):
    h = jnp.tanh(jnp.concatenate([x, h]) @ p["core"])
    return h, h

  h, ys = jax.lax.scan(step, jnp.zeros(4), xs)
  return ys @ p["head"], h


def vae(p, x):
  h = jnp.tanh(x @ p["up"])
  mean, deviation = h @ p["mean"], jnp.exp(h @ p["deviation"])
  return (mean + deviation * 0.3) @ p["head"], mean, deviation


def sown_body(p, x):
  """A body without a head, which hands out the last layer's result as well."""
  y = jnp.tanh(x @ p["up"]) @ p["down"]
  return x + y, {"sown": y}


def masked_after(p, x):
  """The last product is one that no delta can follow."""
  return jnp.tanh(x @ p["up"]) @ (p["masked"] * jnp.tril(jnp.ones((6, 6))))


def labelled_loss(p, x, labels):
  """Losses of labels, some of them left out, and their number."""
  logits = jnp.tanh(x @ p["up"]) @ p["head"]
  known = labels >= 0
  right = labels[:, None] == jnp.arange(logits.shape[-1])[None]
  picked = jnp.where(right, jax.nn.log_softmax(logits), 0.0).sum(-1)
  count = known.astype(jnp.float32).sum()
  return -jnp.where(known, picked, 0.0) / count, count


def loss_with_slope(p, x, labels):
  """Losses, whose gradient by the head's inputs is taken beside them."""
  h = jnp.tanh(x @ p["up"])
  losses, pull = jax.vjp(
    lambda h: labelled_loss({**p, "up": jnp.eye(6)}, h, labels)[0], h
  )
  (slope,) = pull(jnp.ones_like(losses))

  @jax.custom_jvp
  def joined(losses, h, slope):
    return losses

  joined.defjvps(None, lambda along, _, losses, h, slope: (slope * along).sum(-1), None)
  return joined(losses, h, slope)


def loss_with_slope_in_chunks(p, x, labels):
  def add(total, chunk):
    return total + loss_with_slope(p, *chunk), None

  chunks = x[None], labels[None]
  return jax.lax.scan(add, jnp.zeros(len(x)), chunks)[0]


def tied_autoencoder(p, x):
  return jnp.tanh(x @ p["code"]) @ p["code"].T


LABELS = jnp.arange(len(X)) % 3 - 1
STATS = {"mean": jnp.zeros(6), "var": jnp.ones(6)}


@pytest.mark.parametrize(
  ("fn", "shapes", "args", "targets", "heads"),
  [
    (batch_norm, {"up": (6, 6), "head": (6, 2)}, (X, STATS), ["up"], ("head",)),
    (
      lambda p, x: batch_norm(p, x, STATS),
      {"up": (6, 6), "head": (6, 2)}, (X,), ["up"], ("head",),
    ),
    (rnn, {"core": (10, 4), "head": (4, 2)}, (X,), ["core"], ("head",)),
    (
      vae,
      {"up": (6, 5), "mean": (5, 4), "deviation": (5, 4), "head": (4, 6)}, (X,),
      ["deviation", "mean", "up"], ("head",),
    ),
    (sown_body, {"up": (6, 5), "down": (5, 6)}, (X,), ["down", "up"], ()),
    (labelled_loss, {"up": (6, 6), "head": (6, 2)}, (X, LABELS), ["up"], ("head",)),
    (loss_with_slope, {"up": (6, 6), "head": (6, 2)}, (X, LABELS), ["up"], ("head",)),
    (
      loss_with_slope_in_chunks,
      {"up": (6, 6), "head": (6, 2)}, (X, LABELS), ["up"], ("head",),
    ),
    (tied_autoencoder, {"code": (6, 6)}, (X,), ["code"], ()),
    (masked_after, {"up": (6, 6), "masked": (6, 6)}, (X,), ["up"], ()),
  ],
)  # fmt: skip
def test_a_head_feeds_no_other_product(fn, shapes, args, targets, heads):
  params = {n: normal(i, *shape) for i, (n, shape) in enumerate(shapes.items())}
  found = plan(fn, params, *args)
  assert [t.path for t in found.targets] == targets
  assert found.heads == heads


# What the plan shows.


def mixed(p, x, ids):
  x = x + p["table"][ids] + p["position"]
  kernel = p["standardised"] - p["standardised"].mean(0)
  x = x + jnp.tanh(x @ kernel + p["bias"]) * p["scale"]
  x = (
    x
    + x @ p["small"].astype(jnp.float32)
    + jax.lax.ragged_dot(x, p["experts"], jnp.array([1, 2]))
  )
  return (x + x @ p["up"]) @ p["head"]


MIXED = {
  "table": normal(0, 11, 6), "position": normal(1, 3, 6),
  "standardised": normal(2, 6, 6), "bias": normal(3, 6), "scale": normal(4, 6),
  "up": normal(5, 6, 6),
  "small": jnp.ones((6, 6), jnp.int8), "experts": normal(6, 2, 6, 6),
  "idle": normal(7, 6, 6), "head": normal(8, 6, 2),
}  # fmt: skip
IDS = jnp.array([1, 2, 3])


def test_the_plan_shows_what_all_linear_leaves_out_and_why():
  found = plan(mixed, MIXED, X, IDS)
  assert [t.path for t in found.targets] == ["up"]
  shown = str(found)
  for line in (
    "left out: head (6, 2): the output head",
    "left out: table (11, 6): looked up",
    "left out: position (3, 6): used by 'add'",
    "left out: small (6, 6): stored as int8",
    "left out: idle (6, 6): never used",
    "left out: experts (2, 6, 6): used by 'ragged_dot",
    "left out: standardised (6, 6): used by ",
  ):
    assert line in shown
  assert set(found.left_out) == {*MIXED} - {"up", "bias", "scale"}
  assert "head (the output head)" in found.summary()


def test_nothing_is_said_where_nothing_is_left_out():
  fn = lambda p, x: x + jnp.tanh(x @ p["up"]) @ p["down"] * p["scale"]
  params = {"up": normal(2, 6, 5), "down": normal(3, 5, 6), "scale": normal(4, 6)}
  found = plan(fn, params, X)
  assert not found.left_out
  assert "left out" not in str(found)
  assert found.summary() == ""


def test_what_a_list_names_and_is_excluded_or_a_vector_is_shown():
  fn = lambda p, x: x * p["norm"]["w"] + x @ p["a"]["w"] + x @ p["b"]["w"]
  params = {"norm": {"w": normal(1, 6)}, **{n: {"w": normal(2, 6, 6)} for n in "ab"}}
  found = plan(fn, params, X, targets=["w"], exclude=["b"])
  assert [t.path for t in found.targets] == ["a/w"]
  assert found.left_out == {
    "b/w": ((6, 6), "excluded"),
    "norm/w": ((6,), "a vector, and no low-rank delta fits"),
  }


# A weight that exists, but that can't be followed.

MASK = jnp.tril(jnp.ones((6, 6)))
BLOCKED = {
  "masked": {"kernel": normal(2, 6, 6), "bias": normal(3, 6)},
  "out": {"kernel": normal(4, 6, 6)},
}


def blocked(p, x):
  h = x @ (p["masked"]["kernel"] * MASK) + p["masked"]["bias"]
  return x + jnp.tanh(h) @ p["out"]["kernel"]


@pytest.mark.parametrize("targets", [["masked"], ["masked/kernel"], "masked/kernel"])
def test_a_named_weight_that_can_not_be_followed_is_named_or_formed(targets):
  with pytest.raises(lx.LoraxError, match="'masked/kernel' is used by 'mul'"):
    plan(blocked, BLOCKED, X, targets=targets)
  formed = plan(blocked, BLOCKED, X, targets=targets, on_unsupported="materialize")
  assert [t.path for t in formed.targets] == ["masked/kernel"]
  assert formed.targets[0].materialized == ("mul",)


def test_a_list_whose_module_has_no_kernel_says_what_it_has():
  fn = lambda p, x: (x * p["norm"]["scale"]) @ p["up"]
  params = {"norm": {"scale": normal(2, 6)}, "up": normal(3, 6, 6)}
  with pytest.raises(
    lx.LoraxError, match="'norm' names no kernel: 'norm/scale' is a v"
  ):
    plan(fn, params, X, targets=["up", "norm"])


def test_all_linear_that_finds_nothing_says_why():
  fn = lambda p, x: blocked(p, x).sum() + (p["out"]["kernel"] ** 2).sum()
  with pytest.raises(lx.LoraxError, match=r"(?s)masked/kernel: used by 'mul'.*out/ker"):
    plan(fn, BLOCKED, X)


# Biases, by what is added to a product's result.


def haiku_model():
  def forward(x):
    h = jnp.tanh(hk.Linear(6, name="up")(x))
    h = hk.LayerNorm(-1, True, True, name="norm")(h)
    return hk.Linear(2, name="head")(h)

  model = hk.without_apply_rng(hk.transform(forward))
  return model.apply, model.init(jax.random.key(0), X)


def test_biases_are_found_by_what_is_added_to_a_products_result():
  apply_fn, params = haiku_model()
  assert plan(apply_fn, params, X, bias="lora_only").tuned == ("up/b",)
  assert plan(apply_fn, params, X, bias="all").tuned == ("head/b", "up/b")


@pytest.mark.parametrize(
  ("fn", "kernel", "bias"),
  [
    (lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["k"]) + p["c"], (6, 3, 4), (3, 4)),
    (lambda p, x: (p["k"] @ x.T + p["c"][:, None]).T, (5, 6), (5,)),
    (
      lambda p, x: jnp.einsum("bd,edf->ebf", x, p["k"]) + p["c"][:, None],
      (2, 6, 5), (2, 5),
    ),
    (
      lambda p, x: jax.lax.scan(
        lambda x, w: (jnp.tanh(x @ w["k"] + w["c"]), None), x, p
      )[0],
      (2, 6, 6), (2, 6),
    ),
    (
      lambda p, x: jax.vmap(jax.checkpoint(lambda x: p["k"] @ x + p["c"]))(x),
      (5, 6), (5,),
    ),
    (lambda p, x: x @ (p["k"] * 1.5 * MASK) + p["c"], (6, 6), (6,)),
  ],
)  # fmt: skip
def test_a_bias_is_known_in_any_layout(fn, kernel, bias):
  params = {"k": normal(2, *kernel), "c": normal(3, *bias)}
  config = {"targets": "k", "on_unsupported": "materialize"}
  assert plan(fn, params, X, bias="lora_only", **config).tuned == ("c",)


def test_a_position_table_is_no_bias():
  fn = lambda p, x: x @ p["k"] + p["position"]
  params = {"k": normal(2, 6, 6), "position": normal(3, 3, 6)}
  with pytest.raises(lx.LoraxError, match="no such bias"):
    plan(fn, params, X, targets="k", bias="all")


def test_a_bias_of_loras_own_is_merged_into_a_bias_of_any_name():
  apply_fn, params = haiku_model()
  lora = lx.adapt(apply_fn, lx.LoraConfig(rank=2, method="lora_bias"))
  adapter = perturbed(lora.init(jax.random.key(0), params, X))
  check_equals_merged(lora, apply_fn, params, adapter, X)
  back = lx.unmerge(lx.merge(params, adapter), adapter)
  jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, atol=1e-5), back, params)


# Arguments of the function that are called as ours are.


def named(p, x, dropout_key=None, key=None, params=None, adapter=None):
  h = jnp.tanh(x @ p["up"])
  if dropout_key is not None:
    h = h * jax.random.bernoulli(dropout_key, 0.5, h.shape)
  for shift in (key, params, adapter):
    h = h if shift is None else h + jax.random.normal(shift, h.shape)
  return h @ p["down"] + x


NAMED = {"up": normal(2, 6, 5), "down": normal(3, 5, 6)}


@pytest.mark.parametrize("name", ["dropout_key", "key", "params", "adapter"])
def test_an_argument_that_is_called_as_ours_is_the_functions(name):
  lora = lx.adapt(named, lx.LoraConfig(rank=2))
  given = {name: jax.random.key(4)}
  adapter = lora.init(jax.random.key(0), NAMED, X, **given)
  got = lora.apply(NAMED, adapter, X, **given)
  np.testing.assert_array_equal(got, named(NAMED, X, **given))
  assert not np.array_equal(got, named(NAMED, X))


def test_loras_dropout_and_the_functions_own_are_told_apart():
  lora = lx.adapt(named, lx.LoraConfig(rank=2, dropout=0.5))
  key = jax.random.key(4)
  adapter = perturbed(lora.init(jax.random.key(0), NAMED, X))
  with pytest.raises(lx.LoraxError, match="lora_dropout_key=KEY"):
    lora.apply(NAMED, adapter, X, dropout_key=key)
  both = lora.apply(NAMED, adapter, X, dropout_key=key, lora_dropout_key=key)
  ours = lora.apply(NAMED, adapter, X, lora_dropout_key=key)
  assert not np.allclose(both, ours)
  assert not np.allclose(ours, lora.apply(NAMED, adapter, X))
  plain = lx.adapt(lambda p, x: named(p, x), lora.config)
  np.testing.assert_array_equal(plain.apply(NAMED, adapter, X, dropout_key=key), ours)


# What can't be applied or differentiated is refused by the plan.


def doubled(x, w):
  """x @ w, whose rule gives w a gradient that no contraction makes."""

  @jax.custom_vjp
  def product(x, w):
    return x @ w

  def backward(kept, dy):
    x, w = kept
    return dy @ w.T, jnp.cumsum(x.T @ dy, 0)

  product.defvjp(lambda x, w: (x @ w, (x, w)), backward)
  return product(x, w)


def ode(p, x):
  speed = lambda y, t, p: jnp.tanh(y @ p["a"]) @ p["b"]
  return odeint(speed, x, jnp.array([0.0, 0.5]), p)[-1]


def joined_inputs(p, x):
  return jnp.concatenate([x, x], 1) @ jnp.concatenate([p["a"], p["b"].T], 0)


PAIR = {"a": normal(2, 6, 8), "b": normal(3, 8, 6)}


@pytest.mark.parametrize(
  ("fn", "config", "message"),
  [
    (ode, {"targets": ["a", "b"]}, "custom_vjp '_odeint'"),
    (lambda p, x: doubled(x, p["a"]), {"targets": "a"}, "does not follow from a contr"),
    (joined_inputs, {"targets": ["a", "b"], "method": "dora"}, "join of the inputs"),
    (
      lambda p, x: doubled(x, p["a"]) @ p["b"],
      {"targets": ["b"], "tuned": "a"}, None,
    ),
    (joined_inputs, {"targets": ["a", "b"]}, None),
  ],
)  # fmt: skip
def test_the_plan_refuses_what_can_not_be_applied_or_differentiated(
  fn, config, message
):
  lora = lx.adapt(fn, lx.LoraConfig(rank=2, **config))
  if message is None:
    lora.plan(PAIR, X)
    return
  with pytest.raises(lx.LoraxError, match=message):
    lora.plan(PAIR, X)
  with pytest.raises(lx.LoraxError, match=message):
    lora.init(jax.random.key(0), PAIR, X)


def test_a_while_loop_that_jax_can_only_run_is_planned():
  body = lambda x, p: jnp.tanh(x @ (p["w"] * 2.0))
  fn = lambda p, x: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: body(x, p), x)
  assert paths(fn, {"w": normal(2, 6, 6)}, X, targets="w") == ["w"]

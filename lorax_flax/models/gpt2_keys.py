"""The key map of GPT-2 with a language model's head (see keymap.py)."""

from lorax_flax.hub.checkpoints.entries import Entry, embedding, linear, norm
from lorax_flax.hub.checkpoints.keymap import KeyMap

_LAYER = "layer_{i}"
_KEY = "h.{i}"
_HEAD = "lm_head.weight"

# Causal masks that old checkpoints hold, one for each layer.
_MASKS = ("attn.bias", "attn.masked_bias")

# Heads of classifiers, of questions' spans and of multiple choice.
_OTHER = (
  "score.weight",
  *(
    f"{module}.{name}"
    for module in ("classifier", "qa_outputs", "multiple_choice_head.summary")
    for name in ("weight", "bias")
  ),
)


def _conv1d(path: str, key: str) -> tuple[Entry, ...]:
  """The rows of a transformers Conv1D: a linear layer whose weight is (in, out)."""
  kernel = Entry(f"{path}/kernel", f"{key}.weight")
  return kernel, Entry(f"{path}/bias", f"{key}.bias")


_ENTRIES = (
  embedding("wte", "wte"),
  embedding("wpe", "wpe"),
  *norm(f"{_LAYER}/ln_1", f"{_KEY}.ln_1"),
  *_conv1d(f"{_LAYER}/attn/c_attn", f"{_KEY}.attn.c_attn"),
  *_conv1d(f"{_LAYER}/attn/c_proj", f"{_KEY}.attn.c_proj"),
  *norm(f"{_LAYER}/ln_2", f"{_KEY}.ln_2"),
  *_conv1d(f"{_LAYER}/mlp/c_fc", f"{_KEY}.mlp.c_fc"),
  *_conv1d(f"{_LAYER}/mlp/c_proj", f"{_KEY}.mlp.c_proj"),
  *norm("ln_f", "ln_f"),
)


def keymap(num_layers: int, tied: bool, scan: bool = False) -> KeyMap:
  """The key map of a GPT-2; `tied`, its head is the table of its tokens."""
  head = linear("lm_head", "lm_head", bias=False, part="head")
  return KeyMap(
    family="gpt2",
    prefix="transformer.",
    entries=_ENTRIES if tied else (*_ENTRIES, *head),
    counts={"i": num_layers},
    scan=scan,
    anchor="wte.weight",
    buffers=tuple(f"h.{i}.{name}" for i in range(num_layers) for name in _MASKS),
    other_heads=_OTHER,
    head_groups=(),
    ties={_HEAD: "wte.weight"} if tied else {},
  )

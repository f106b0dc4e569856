"""The key map of Llama and its relatives (see keymap.py)."""

from collections.abc import Sequence

from lorax_flax.hub.keymap import KeyMap
from lorax_flax.hub.rows import Entry, embedding, linear, norm

_LAYER = "model/layer_{i}"
_KEY = "layers.{i}"


def _linears(part: str, biased: dict[str, bool]) -> list[Entry]:
  return [
    entry
    for name, bias in biased.items()
    for entry in linear(f"{_LAYER}/{part}/{name}", f"{_KEY}.{part}.{name}", bias=bias)
  ]


def keymap(
  family: str,
  num_layers: int,
  scan: bool = False,
  *,
  attention: dict[str, bool],
  mlp: dict[str, bool],
  layer_norms: Sequence[str],
  head_norms: Sequence[str] = (),
  tied: bool = False,
) -> KeyMap:
  """The key map of a decoder.

  Args:
    attention, mlp: their projections: whether each has a bias.
    layer_norms: the norms of a layer.
    head_norms: the norms of attention's heads.
    tied: the head's weight is the embedding's.
  """
  scale = {"bias": False}
  entries = (
    embedding("model/embed_tokens", "embed_tokens"),
    *_linears("self_attn", attention),
    *(
      entry
      for name in head_norms
      for entry in norm(
        f"{_LAYER}/self_attn/{name}", f"{_KEY}.self_attn.{name}", **scale
      )
    ),
    *_linears("mlp", mlp),
    *(
      entry
      for name in layer_norms
      for entry in norm(f"{_LAYER}/{name}", f"{_KEY}.{name}", **scale)
    ),
    *norm("model/norm", "norm", **scale),
    *(() if tied else linear("lm_head", "lm_head", part="head", bias=False)),
  )
  return KeyMap(
    family=family,
    prefix="model.",
    entries=entries,
    counts={"i": num_layers},
    scan=scan,
    anchor="embed_tokens.weight",
    # Old checkpoints hold the angles' frequencies.
    buffers=tuple(
      f"layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(num_layers)
    ),
    other_heads=("score.weight",),
    head_groups=(),
    ties={"lm_head.weight": "embed_tokens.weight"} if tied else {},
  )

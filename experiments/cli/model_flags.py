"""Flags that the commands which read a base and an adapter have in common."""

from absl import flags

from lorax_flax.quant import CHOICES


def base(values: flags.FlagValues) -> flags.FlagHolder:
  """Defines --base."""
  return flags.DEFINE_string(
    "base",
    None,
    "The base: a folder, a name on the Hugging Face hub, or an alias (minilm).",
    flag_values=values,
    required=True,
  )


def quant(values: flags.FlagValues) -> flags.FlagHolder:
  """Defines --quant."""
  return flags.DEFINE_enum(
    "quant",
    None,
    [*CHOICES],
    "A format for the base's kernels in memory, or as_stored in a GGUF file; an adapter"
    " then stays beside them.",
    flag_values=values,
  )


def other_base(values: flags.FlagValues) -> flags.FlagHolder:
  """Defines --other_base."""
  return flags.DEFINE_bool(
    "other_base",
    False,
    "Load an adapter although its provenance.json says that it was trained on other"
    " weights than the base's.",
    flag_values=values,
  )


def adapter(
  values: flags.FlagValues,
  name: str = "adapter",
  *,
  note: str = "",
  required: bool = True,
) -> flags.FlagHolder:
  """Defines --adapter; `note` is the end of its help."""
  return flags.DEFINE_string(
    name,
    None,
    f"The adapter: a PEFT folder, or one that convert wrote. {note}".rstrip(),
    flag_values=values,
    required=required,
  )


def chat_template(values: flags.FlagValues) -> flags.FlagHolder:
  """Defines --chat_template."""
  return flags.DEFINE_string(
    "chat_template",
    None,
    "A .jinja file in place of the model's own chat template.",
    flag_values=values,
  )


def out(
  values: flags.FlagValues, name: str = "out", kind: str = "folder"
) -> flags.FlagHolder:
  """Defines --out, a folder or a file."""
  return flags.DEFINE_string(
    name, None, f"The {kind} to write.", flag_values=values, required=True
  )


def overwrite(values: flags.FlagValues, what: str) -> flags.FlagHolder:
  """Defines --overwrite; `what` may be replaced."""
  return flags.DEFINE_bool("overwrite", False, f"Replace {what}.", flag_values=values)

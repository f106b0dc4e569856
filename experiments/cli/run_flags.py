"""Flags that the commands which train have in common."""

from absl import flags


def workdir(values: flags.FlagValues, usual: str) -> flags.FlagHolder:
  """Defines --workdir; `usual` is the folder without it."""
  return flags.DEFINE_string(
    "workdir",
    None,
    f"The folder to write, or gs://BUCKET/FOLDER; {usual} without it.",
    flag_values=values,
  )


def distributed(values: flags.FlagValues) -> flags.FlagHolder:
  """Defines --distributed."""
  return flags.DEFINE_bool(
    "distributed",
    False,
    "Join the other processes that the cluster (Slurm, a TPU pod, …) has started.",
    flag_values=values,
  )


def at_once(values: flags.FlagValues) -> flags.FlagHolder:
  """Defines --at_once."""
  return flags.DEFINE_integer(
    "at_once",
    8,
    "Largest number of trials that train together: each needs memory for its batch.",
    lower_bound=1,
    flag_values=values,
  )


def prune(values: flags.FlagValues) -> flags.FlagHolder:
  """Defines --prune."""
  return flags.DEFINE_string(
    "prune",
    None,
    "Stop trials that do worse than others, as Optuna's pruners do, and give their "
    "places to waiting ones: halving or median, with options as "
    "halving:reduction_factor=4,min_resource=20,examples=512.",
    flag_values=values,
  )

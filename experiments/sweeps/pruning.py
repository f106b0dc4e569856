"""Pruning: trials of a sweep that are stopped early, as Optuna's pruners decide.

  --prune=halving
  --prune=halving:reduction_factor=3,min_resource=20
  --prune=median:n_startup_trials=8,examples=1000

The options are those of `optuna.pruners`, and `examples`:

- halving (SuccessiveHalvingPruner): trials are judged after min_resource steps and at
  each multiple by reduction_factor (4) from there; of those judged at a step, the best
  1 / reduction_factor go on. min_resource is a sixteenth of a trial's steps unless it
  is given; min_early_stopping_rate and bootstrap_count are 0.
- median (MedianPruner): trials are judged every interval_steps (a tenth of a trial's
  steps), after n_warmup_steps (as many); one that is worse than the median of the
  trials that have ended is stopped. n_startup_trials is 5, n_min_trials 1.
- examples: number of held-out examples that trials are judged by, 512. They are a
  sample; a trial's result is by all of them, as it is without pruning.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorax_flax.errors import LoraxError, check_known
from lorax_flax.train.judging import Judge, Standing
from lorax_flax.train.metrics import METRICS

_EXAMPLES = 512


@dataclass(frozen=True)
class Pruning:
  """The content of --prune.

  Attributes:
    name: a key of `_PRUNERS`.
    options: of the pruner, whole numbers by name; the others have their defaults.
    examples: number of held-out examples that trials are judged by.
  """

  name: str
  options: Mapping[str, int]
  examples: int

  def to_json(self) -> dict[str, Any]:
    """The part of the sweep's config.json."""
    return {"pruner": self.name, "examples": self.examples, **self.options}


def _halving_steps(total: int, options: Mapping[str, int]) -> list[int]:
  """Completion points of the rungs, as SuccessiveHalvingPruner has them."""
  factor = options["reduction_factor"]
  first = options["min_resource"] * factor ** options["min_early_stopping_rate"]
  rungs = int(math.log(max(total / first, 1), factor)) + 2
  return [first * factor**rung for rung in range(rungs) if first * factor**rung < total]


def _median_steps(total: int, options: Mapping[str, int]) -> list[int]:
  interval = options["interval_steps"]
  return [*range(options["n_warmup_steps"] or interval, total, interval)]


@dataclass(frozen=True)
class _Pruner:
  """A pruner of Optuna's.

  Attributes:
    optuna: its name there.
    defaults: options by name, for a number of steps.
    steps: (number of steps, options) -> those after which a trial is judged.
  """

  optuna: str
  defaults: Callable[[int], dict[str, int]]
  steps: Callable[[int, Mapping[str, int]], list[int]]


_PRUNERS = {
  "halving": _Pruner(
    "SuccessiveHalvingPruner",
    lambda total: {
      "min_resource": -(-total // 16),
      "reduction_factor": 4,
      "min_early_stopping_rate": 0,
      "bootstrap_count": 0,
    },
    _halving_steps,
  ),
  "median": _Pruner(
    "MedianPruner",
    lambda total: {
      "n_startup_trials": 5,
      "n_warmup_steps": -(-total // 10),
      "interval_steps": -(-total // 10),
      "n_min_trials": 1,
    },
    _median_steps,
  ),
}


def read(text: str | None) -> Pruning | None:
  """The content of --prune; None: nothing is pruned.

  Raises:
    LoraxError: no such pruner or option, a value that can't be, no Optuna.
  """
  if text is None:
    return None
  name, _, rest = text.partition(":")
  check_known("--prune", name, _PRUNERS)
  options: dict[str, int] = {}
  known = [*_PRUNERS[name].defaults(1), "examples"]
  for part in filter(None, rest.split(",")):
    option, _, value = part.partition("=")
    check_known(f"option of --prune={name}", option, known)
    if not value.isdecimal():
      raise LoraxError(f"--prune: {option} is a whole number, not {value!r}")
    options[option] = int(value)
  examples = options.pop("examples", _EXAMPLES)
  if examples < 1:
    raise LoraxError("--prune: examples must be at least 1")
  found = Pruning(name, options, examples)
  _pruner(found, 1)
  return found


def judge(
  pruning: Pruning, before: Sequence[Standing], total: int, primary: str
) -> Judge:
  """The judge of trials that train together.

  Args:
    before: standings of trials that were over before these were chosen.
    total: number of steps of a trial.
    primary: the metric that they are judged by.

  Raises:
    LoraxError: none would be judged before its end.
  """
  found, options = _PRUNERS[pruning.name], _options(pruning, total)
  steps = found.steps(total, options)
  if not steps:
    given = ", ".join(f"{name} {value}" for name, value in options.items())
    raise LoraxError(
      f"--prune={pruning.name}: a trial of {total} steps would not be judged before "
      f"its end ({given}). Train longer, or judge earlier: --prune={pruning.name}:"
      f"{next(iter(found.defaults(total)))}=…"
    )
  maximize = METRICS[primary].better(1.0, 0.0)

  def prunes(standings: Sequence[Standing], number: int) -> bool:
    others = [*before, *standings[:number], *standings[number + 1 :]]
    return decide(_pruner(pruning, total), maximize, others, standings[number])

  return Judge(pruning.name, steps, pruning.examples, prunes)


def decide(
  pruner: Any, maximize: bool, others: Sequence[Standing], own: Standing
) -> bool:
  """The decision of one of Optuna's pruners on a trial, after its last score.

  The study is made anew each time: the standings are all that there is to know.
  """
  import optuna

  study = optuna.create_study(
    direction="maximize" if maximize else "minimize", pruner=pruner
  )
  states = optuna.trial.TrialState
  for other in others:
    scores = [*other.scores.values()]
    study.add_trial(
      optuna.trial.create_trial(
        state=states.COMPLETE if other.complete else states.PRUNED,
        value=scores[-1] if other.complete and scores else None,
        intermediate_values=dict(other.scores),
        # Where SuccessiveHalvingPruner looks for the scores of others.
        system_attrs={f"completed_rung_{i}": x for i, x in enumerate(scores)},
      )
    )
  trial, stopped = study.ask(), False
  for step, score in own.scores.items():
    trial.report(score, step)
    stopped = trial.should_prune()
  return stopped


def _options(pruning: Pruning, total: int) -> dict[str, int]:
  return _PRUNERS[pruning.name].defaults(total) | dict(pruning.options)


def _pruner(pruning: Pruning, total: int) -> Any:
  """The pruner of Optuna's.

  Raises:
    LoraxError: an option that it refuses; it is not installed.
  """
  try:
    import optuna
  except ImportError as error:
    raise LoraxError("--prune needs Optuna: pip install 'lorax-flax[sweep]'") from error
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  make = getattr(optuna.pruners, _PRUNERS[pruning.name].optuna)
  try:
    return make(**_options(pruning, total))
  except ValueError as error:
    raise LoraxError(f"--prune={pruning.name}: {error}") from error

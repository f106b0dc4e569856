"""A search for good settings: bounds in a config, within which Optuna chooses trials.

A config's file gives the bounds in a function beside `get_config`:

    def search(space):
      space.log_uniform("train.learning_rate", 1e-4, 1e-2)
      space.integer("lora.rank", 2, 16)
      space.choice("lora.alpha", [8.0, 16.0])
      space.trials(24, at_once=8)

Trials are chosen some at a time, which train together. What is chosen follows from the
seed of the config and from how the trials before have ended, so a search that was
interrupted goes on as if it had not been.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.cli import config_flag
from experiments.sweeps import outcomes as ends
from experiments.sweeps.outcomes import Outcome
from lorax_flax.errors import LoraxError
from lorax_flax.train.metrics import METRICS


@dataclass
class Space:
  """Bounds of a search.

  Attributes:
    bounds: by field of the config, (kind, arguments).
    count: number of trials.
    at_once: number of trials that are chosen at a time.
  """

  bounds: dict[str, tuple[str, tuple]] = field(default_factory=dict)
  count: int = 0
  at_once: int = 8

  def uniform(self, name: str, low: float, high: float) -> None:
    """A number between two, uniformly."""
    self._add(name, "uniform", float(low), float(high))

  def log_uniform(self, name: str, low: float, high: float) -> None:
    """A number between two, uniform in its logarithm."""
    self._add(name, "log_uniform", float(low), float(high))
    if low <= 0:
      raise LoraxError(f"search: {name} has no logarithm at {low}")

  def integer(self, name: str, low: int, high: int) -> None:
    """A whole number between two, both included."""
    self._add(name, "integer", low, high)

  def choice(self, name: str, values: Sequence[Any]) -> None:
    """One of these."""
    if not values:
      raise LoraxError(f"search: {name} has nothing to choose from")
    self._add(name, "choice", *values)

  def trials(self, count: int, at_once: int = 8) -> None:
    """Number of trials, and of those that are chosen at a time."""
    if count < 1 or at_once < 1:
      raise LoraxError("search: trials(count, at_once) must both be at least 1")
    self.count, self.at_once = count, at_once

  def to_json(self) -> dict[str, Any]:
    """Content of the folder's config.json."""
    return {"bounds": self.bounds, "trials": self.count, "at_once": self.at_once}

  def first(self) -> dict[str, Any]:
    """A point of the space, to check its fields by."""
    return {name: arguments[0] for name, (_, arguments) in self.bounds.items()}

  def _add(self, name: str, kind: str, *arguments: Any) -> None:
    if name in self.bounds:
      raise LoraxError(f"search: {name} has bounds already")
    if kind != "choice" and not arguments[0] < arguments[1]:
      raise LoraxError(f"search: {name} is between {arguments[0]} and {arguments[1]}")
    self.bounds[name] = (kind, arguments)


def space(spec: str) -> Space | None:
  """The space that the `search(space)` of a config's file says; None: it has none.

  Raises:
    LoraxError: what goes wrong in it; bounds or a number of trials are missing.
  """
  search = config_flag.function(spec, "search")
  if search is None:
    return None
  file, _ = config_flag.find(spec)
  found = Space()
  with config_flag.running(file):
    search(found)
    if not found.bounds:
      raise LoraxError("search(space) gives no bounds, as space.uniform does")
    if not found.count:
      raise LoraxError("search(space) does not say how many: space.trials(24)")
  return found


def ask(space: Space, seed: int, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
  """The next trials' changes.

  Args:
    seed: of the search.
    outcomes: of all trials that were chosen before; all are over.

  Raises:
    LoraxError: Optuna is not installed.
  """
  try:
    import optuna
  except ImportError as error:
    raise LoraxError(
      "a search needs Optuna: pip install 'lorax-flax[sweep]'"
    ) from error
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  known = optuna.distributions
  kinds: dict[str, Any] = {
    "uniform": known.FloatDistribution,
    "log_uniform": functools.partial(known.FloatDistribution, log=True),
    "integer": known.IntDistribution,
    "choice": lambda *values: known.CategoricalDistribution(values),
  }
  bounds = {name: kinds[kind](*args) for name, (kind, args) in space.bounds.items()}
  # The history is given anew each time: the folders hold it, and nothing else need.
  metric = METRICS.get(ends.primary(outcomes))
  maximize = metric is None or metric.better(1.0, 0.0)
  sampler = optuna.samplers.TPESampler(
    seed=seed + len(outcomes), constant_liar=True, multivariate=False
  )
  study = optuna.create_study(
    direction="maximize" if maximize else "minimize", sampler=sampler
  )
  for outcome in outcomes:
    # Of a trial that diverged the sampler learns that it is worse than all others; of
    # one that was pruned, how far it came.
    done = outcome.score is not None
    state = optuna.trial.TrialState
    study.add_trial(
      optuna.trial.create_trial(
        params=dict(outcome.trial.changes),
        distributions=bounds,
        value=outcome.score,
        intermediate_values=dict(outcome.scores),
        state=state.COMPLETE if done else state.PRUNED,
      )
    )
  more = min(space.at_once, space.count - len(outcomes))
  return [study.ask(bounds).params for _ in range(more)]

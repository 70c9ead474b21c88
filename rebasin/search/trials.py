"""The loop of a search: ask for a candidate, measure it batch by batch, tell what it is worth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ..errors import CheckpointError, RebasinError
from ..types import Progress, tell
from .candidate import Candidate
from .evaluator import Setup
from .study import finished, make_sampler, seconds_of

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


SAME = "same_as"
"""The note on a trial of a merge that was measured before: the number of that trial."""

STEP = 9973
"""Between the seeds of workers; the number of finished trials is added."""


@dataclass(frozen=True)
class Budget:
    """When a search ends, all its continuations together; 0 is no limit."""

    trials: int = 0
    minutes: float = 0.0

    def left(self, study: optuna.Study) -> bool:
        """Whether another trial may begin."""
        done = finished(study)
        within_trials = not self.trials or len(done) < self.trials
        return within_trials and (not self.minutes or seconds_of(done) < 60 * self.minutes)


def work(
    study: optuna.Study,
    setup: Setup,
    options: DictConfig,
    *,
    seed: int,
    worker: int = 0,
    alive: Callable[[], bool] = lambda: True,
    progress: Progress | None = None,
) -> None:
    """Try candidates until the budget is spent; each is in the study's file as soon as it is measured.

    Args:
        options: the config group `search`: the budget, `sampler`, and `warm`, how many trials there are before the
            sampler trusts its model of the objective.
        worker: its number; each worker draws other candidates.
        alive: asked before each trial; False ends the loop (the process that started this worker is gone).
        progress: called after each trial with stage, step, total, left, loss, best and given_up.
    """
    budget = Budget(options.trials, options.minutes)
    spent = seconds_of(finished(study))
    deadline = time.monotonic() + 60 * budget.minutes - spent if budget.minutes else math.inf
    objective, *others = setup.evaluator.objectives

    def told(study: optuna.Study, trial: FrozenTrial) -> None:
        """One that time ran out for is none."""
        if trial.state.name != "FAIL":
            done, parts = finished(study), [*trial.intermediate_values.values()]
            full = [t.values[0] for t in done if t.state.name == "COMPLETE" and math.isfinite(t.values[0])]
            given_up = trial.state.name == "PRUNED"
            partly = objective.mean(parts, "search") if parts else math.inf
            loss, best = partly if given_up else trial.values[0], None if others else min(full, default=None)
            figures = {"left": _left(budget, done), "loss": loss, "objective": best, "given_up": given_up}
            tell(progress, "trial", len(done), budget.trials or None, **figures)

    while alive() and budget.left(study) and time.monotonic() < deadline:
        done = finished(study)
        # A sampler that proposes what it has proposed is stuck: the next candidate is a random one.
        stuck = bool(done) and SAME in done[-1].user_attrs
        name = "random" if stuck else options.sampler
        study.sampler = make_sampler(name, seed + STEP * worker + len(done), options.warm)
        once = partial(_measured, setup=setup, deadline=deadline)
        study.optimize(once, n_trials=1, callbacks=[told])


def _suggested(trial: optuna.Trial, setup: Setup) -> Candidate:
    """What to try.

    Raises:
        CheckpointError: the study's own record of what it draws from is of other kinds of numbers.
    """
    try:
        return setup.space.suggest(trial)
    except ValueError as error:
        raise CheckpointError(
            f"The study of this search can't be continued ({str(error).rstrip('.')}); move its study.db and search"
            " anew."
        ) from error


def _measured(trial: optuna.Trial, setup: Setup, deadline: float) -> Any:
    """The losses of one trial; None if time ran out, which Optuna takes for a failure.

    Raises:
        TrialPruned: it was given up, or can't be made.
    """
    from optuna import TrialPruned

    objectives, candidate = setup.evaluator.objectives, _suggested(trial, setup)
    try:
        trial.set_user_attr("candidate", candidate.to_dict())
        twin = _twin(trial.study, candidate)
        if twin is not None:
            return _repeated(trial, twin)
        known = "start" in trial.user_attrs
        model = setup.evaluator.load(candidate)
        values = []
        for objective in objectives:
            losses: list[float] = []
            for step, batch in enumerate(objective.search):
                loss = objective.measure(model, batch)
                losses.append(math.inf if math.isnan(loss) else loss)
                last = len(losses) == len(objective.search)
                if time.monotonic() > deadline and not last:
                    return None
                if len(objectives) == 1:
                    trial.report(losses[-1], step)
                    if not known and not last and trial.should_prune():
                        trial.set_user_attr("batches", len(losses))
                        raise TrialPruned
            values.append(objective.mean(losses, "search"))
        return values
    except RebasinError as error:
        # A merge that these models do not allow (numbers that are not finite, say) is a bad one, not the end.
        trial.set_user_attr("error", str(error))
        raise TrialPruned from error


def _twin(study: optuna.Study, candidate: Candidate) -> FrozenTrial | None:
    """A finished trial of the same merge."""
    told = candidate.to_dict()
    notes = ((trial, trial.user_attrs) for trial in finished(study))
    return next((trial for trial, n in notes if n.get("candidate") == told and "error" not in n), None)


def _repeated(trial: optuna.Trial, twin: FrozenTrial) -> list[float]:
    """What was measured of its twin; raises TrialPruned if that was given up."""
    from optuna import TrialPruned

    trial.set_user_attr(SAME, twin.number)
    if "batches" in twin.user_attrs:
        trial.set_user_attr("batches", twin.user_attrs["batches"])
    for step, value in sorted(twin.intermediate_values.items()):
        trial.report(value, step)
    if twin.state.name == "PRUNED":
        raise TrialPruned
    return list(twin.values)


def _left(budget: Budget, done: Sequence[FrozenTrial]) -> float | None:
    """Seconds until the budget ends, at the pace so far."""
    spent, ends = seconds_of(done), []
    if budget.minutes:
        ends.append(60 * budget.minutes - spent)
    if budget.trials and done:
        ends.append(spent / len(done) * (budget.trials - len(done)))
    return max(0.0, min(ends)) if ends else None

"""The loop of a search: ask for a candidate, measure it batch by batch, tell what it is worth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import RebasinError
from ..types import Progress, tell
from .candidate import Candidate
from .evaluator import Evaluator
from .space import Space
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
    space: Space,
    evaluator: Evaluator,
    budget: Budget,
    *,
    sampler: str = "tpe",
    warm: int = 10,
    seed: int = 0,
    worker: int = 0,
    alive: Callable[[], bool] = lambda: True,
    progress: Progress | None = None,
) -> None:
    """Try candidates until the budget is spent; each is in the study's file as soon as it is measured.

    Args:
        warm: trials before the sampler trusts its model of the objective.
        worker: its number; each worker draws other candidates.
        alive: asked before each trial; False ends the loop (the process that started this worker is gone).
        progress: called after each trial with stage, step, total, left, loss, best and given_up.
    """
    began = time.monotonic() - seconds_of(finished(study))
    best = math.inf
    while alive() and budget.left(study):
        done = finished(study)
        # A sampler that proposes what it has proposed is stuck: the next candidate is a random one.
        stuck = bool(done) and SAME in done[-1].user_attrs
        study.sampler = make_sampler("random" if stuck else sampler, seed + STEP * worker + len(done), warm)
        trial = study.ask()
        deadline = began + 60 * budget.minutes if budget.minutes else math.inf
        losses, given_up = _try(study, trial, space, evaluator, deadline)
        if losses is None:
            return
        done = finished(study)
        if len(evaluator.objectives) == 1:
            full = [t.value for t in done if t.state.name == "COMPLETE" and t.value is not None]
            best = min(full, default=best)
        left, objective = _left(budget, done), best if math.isfinite(best) else None
        tell(
            progress, "trial", len(done), budget.trials or None,
            left=left, loss=losses[0], objective=objective, given_up=given_up,
        )  # fmt: skip


def _try(
    study: optuna.Study, trial: optuna.Trial, space: Space, evaluator: Evaluator, deadline: float
) -> tuple[list[float] | None, bool]:
    """Measure one trial and tell the study; (its losses, whether it was given up), (None, ...) if time ran out."""
    from optuna.trial import TrialState

    objectives = evaluator.objectives
    try:
        candidate = space.suggest(trial)
        trial.set_user_attr("candidate", candidate.to_dict())
        twin = _twin(study, candidate)
        if twin is not None:
            return _repeat(study, trial, twin), twin.state == TrialState.PRUNED
        known = "start" in trial.user_attrs
        model = evaluator.load(candidate)
        values = []
        for objective in objectives:
            losses: list[float] = []
            for step, batch in enumerate(objective.search):
                loss = objective.measure(model, batch)
                losses.append(math.inf if math.isnan(loss) else loss)
                if time.monotonic() > deadline and len(objective.search) > len(losses):
                    study.tell(trial, state=TrialState.FAIL)
                    return None, True
                if len(objectives) == 1:
                    trial.report(losses[-1], step)
                    if not known and len(losses) < len(objective.search) and trial.should_prune():
                        trial.set_user_attr("batches", len(losses))
                        study.tell(trial, state=TrialState.PRUNED)
                        return [objective.mean(losses, "search")], True
            values.append(objective.mean(losses, "search"))
        study.tell(trial, values)
        return values, False
    except RebasinError as error:
        # A merge that these models do not allow (numbers that are not finite, say) is a bad one, not the end.
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=TrialState.PRUNED)
        return [math.inf], True
    except KeyboardInterrupt:
        study.tell(trial, state=TrialState.FAIL)
        raise


def _twin(study: optuna.Study, candidate: Candidate) -> FrozenTrial | None:
    """A finished trial of the same merge."""
    told = candidate.to_dict()
    notes = ((trial, trial.user_attrs) for trial in finished(study))
    return next((trial for trial, n in notes if n.get("candidate") == told and "error" not in n), None)


def _repeat(study: optuna.Study, trial: optuna.Trial, twin: FrozenTrial) -> list[float]:
    """Tell of a trial what was measured of its twin; returns the losses."""
    from optuna.trial import TrialState

    trial.set_user_attr(SAME, twin.number)
    if "batches" in twin.user_attrs:
        trial.set_user_attr("batches", twin.user_attrs["batches"])
    for step, value in sorted(twin.intermediate_values.items()):
        trial.report(value, step)
    if twin.state == TrialState.PRUNED:
        study.tell(trial, state=TrialState.PRUNED)
        return [sum(twin.intermediate_values.values()) / max(1, len(twin.intermediate_values))]
    study.tell(trial, twin.values)
    return list(twin.values)


def _left(budget: Budget, done: Sequence[FrozenTrial]) -> float | None:
    """Seconds until the budget ends, at the pace so far."""
    spent, ends = seconds_of(done), []
    if budget.minutes:
        ends.append(60 * budget.minutes - spent)
    if budget.trials and done:
        ends.append(spent / len(done) * (budget.trials - len(done)))
    return max(0.0, min(ends)) if ends else None

"""The study on disk: Optuna's sqlite file in the run's folder, which survives a kill and is shared by workers.

What has been tried is in the file alone. Before each trial the sampler is made anew with a seed that follows from the
number of finished trials, so a search that was killed and goes on proposes what it would have proposed anyway.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..errors import CheckpointError, ConfigError, shown
from ..files import SchemaError, conform
from .folder import digests
from .objectives import SearchObjective

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

NAME = "study.db"
STUDY = "merge"
FOR = "made_for"


def need_optuna() -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed; says how.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "A search needs Optuna, which is not installed: pip install 'git-rebasin[search]'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def open_study(folder: Path, objectives: Sequence[SearchObjective], prune: float) -> optuna.Study:
    """The study in `folder`, made if there is none.

    Args:
        objectives: all to be small.
        prune: give up on a trial once Wilcoxon's test says, with this probability of error, that it is worse than the
            best on the batches so far; 0 never does. With several objectives nothing is given up.

    Raises:
        CheckpointError: the file is damaged, or is of a search for other objectives.
    """
    optuna = need_optuna()
    if not 0 <= prune < 1:
        raise ConfigError(f"search.prune is {prune}, but it is a probability: 0 (never) to below 1.")
    path = folder / NAME
    pruner = optuna.pruners.NopPruner()
    if prune and len(objectives) == 1:
        pruner = optuna.pruners.WilcoxonPruner(p_threshold=prune, n_startup_steps=3)
    try:
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{path}",
            engine_kwargs={"connect_args": {"timeout": 60}},  # workers write in turn
        )
        _quick(storage.engine)
        study = optuna.create_study(
            storage=storage,
            study_name=STUDY,
            directions=["minimize"] * len(objectives),
            pruner=pruner,
            load_if_exists=True,
        )
        _require_sound(study, storage.engine)
    except Exception as error:
        if _is_full(error):
            raise _unwritable(path, error) from error
        # SQLAlchemy, alembic and Optuna have errors of their own for a file that is no study.
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} can't be opened as an Optuna study ({shown(why)[1:-1]}); move it and search anew."
        ) from error
    if len(study.directions) != len(objectives):
        raise CheckpointError(
            f"{path} is a search for {len(study.directions)} objectives, not {len(objectives)}; choose another"
            " folder."
        )
    study.set_metric_names([one.name for one in objectives])
    return study


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What is tried within the block is kept in the study's file at each step.

    Raises:
        CheckpointError: the disk is full, or the file can't be written any more.
    """
    optuna = need_optuna()
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        if not _is_full(error):
            raise
        raise _unwritable(folder / NAME, error) from error


FULL = ("disk is full", "disk I/O error", "readonly database")
"""What SQLite says where it can't write."""


def _is_full(error: BaseException) -> bool:
    return _said(error) is not None


def _said(error: BaseException | None) -> str | None:
    while error is not None:
        if found := next((words for words in FULL if words in str(error)), None):
            return found
        error = error.__cause__ or error.__context__
    return None


def _unwritable(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{path} can't be written ({_said(error)}); make room there, and the same command goes on with what was tried."
    )


def require_same(folder: Path, config: Mapping[str, Any]) -> None:
    """Complain if the study in `folder` is of another search: its trials would be taken for this one's.

    Raises:
        ConfigError: names what differs.
    """
    if not (folder / NAME).is_file():
        return
    optuna = need_optuna()
    try:
        attributes = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{folder / NAME}").user_attrs
        then = conform(Mapping[str, str], attributes.get(FOR, {}), FOR)
    except Exception:  # opening it in earnest will tell what is wrong
        return
    now = digests(config)
    if differ := [name for name in then if then[name] != now.get(name)]:
        raise ConfigError(
            f"The search in {folder} is another one, its {' and '.join(differ)} differed; choose another folder with"
            " hydra.run.dir=FOLDER, or search anew there with again=true."
        )


class CandidateData(TypedDict):
    """A candidate as `Candidate.to_dict` has it."""

    method: str
    weight: float | list[float] | Mapping[str, float | list[float]] | None
    options: Mapping[str, Any]


class Notes(TypedDict, total=False):
    """What a search notes on a trial."""

    candidate: CandidateData
    start: str
    batches: int
    same_as: int
    error: str


def _require_sound(study: optuna.Study, engine: Any) -> None:
    """Raise whatever a damaged file gives rise to: here, not in the middle of the search."""
    with engine.connect() as connection:
        told = connection.exec_driver_sql("PRAGMA quick_check").scalar()
    if told != "ok":
        raise SchemaError(f"the database is damaged: {told}")
    conform(Mapping[str, list[float]], study.user_attrs.get("baseline", {}), "baseline")
    from optuna.distributions import check_distribution_compatibility

    known: dict[str, Any] = {}
    for trial in study.get_trials(deepcopy=False):
        at = f"trial {trial.number}"
        for name, distribution in trial.distributions.items():
            check_distribution_compatibility(known.setdefault(name, distribution), distribution)
        conform(Notes, trial.user_attrs, at)
        if trial.state.name == "COMPLETE" and "candidate" not in trial.user_attrs:
            raise SchemaError(f"{at} has no merge")
        conform(list[float], [*(trial.values or ()), *trial.intermediate_values.values()], at)


def _quick(engine: Any) -> None:
    """A write-ahead log without a sync at each report: a kill loses nothing, a power cut the last trials at most."""
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def _(connection: Any, _record: Any) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL"):
            connection.execute(f"PRAGMA {pragma}").close()

    engine.dispose()  # connections from before


def take_over(study: optuna.Study) -> int:
    """Call trials that a killed search left running failed; returns how many. Only while no other worker runs.

    One that had a start to try waits again under its own number, so that the order of trials is that without a kill.
    """
    states = need_optuna().trial.TrialState
    stale = finished(study, "RUNNING")
    for trial in stale:
        if "start" in trial.user_attrs and not trial.intermediate_values:
            # What optuna does the other way round when it takes a queued trial; its public face has no way back.
            study._storage.set_trial_state_values(trial._trial_id, state=states.WAITING)
        else:
            study.tell(trial.number, state=states.FAIL, skip_if_finished=True)
    return len(stale)


def enqueue(study: optuna.Study, starts: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Queue the warm starts (name, parameters) that have not been tried."""
    done = {t.user_attrs.get("start") for t in finished(study, "COMPLETE", "PRUNED", "WAITING")}
    for name, parameters in starts:
        if name not in done:
            study.enqueue_trial(dict(parameters), user_attrs={"start": name})


def finished(study: optuna.Study, *states: str) -> list[FrozenTrial]:
    """The trials that were measured, in full or until they were given up; or those in other `states`."""
    wanted = states or ("COMPLETE", "PRUNED")
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in wanted]


def seconds_of(trials: Sequence[FrozenTrial]) -> float:
    """Wall time in which at least one of these trials ran: pauses between a kill and its continuation do not count."""
    spans = sorted(
        (trial.datetime_start.timestamp(), trial.datetime_complete.timestamp())
        for trial in trials
        if trial.datetime_start is not None and trial.datetime_complete is not None
    )
    total, end = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def make_sampler(name: str, seed: int, warm: int) -> Any:
    """Optuna's sampler.

    Args:
        warm: trials, warm starts among them, before a model of the objective is trusted.

    Raises:
        ConfigError: an unknown name.
    """
    samplers = need_optuna().samplers
    known = {
        # Grouped: parameters of one method exist only with it.
        "tpe": partial(samplers.TPESampler, n_startup_trials=warm, multivariate=True, group=True),
        "gp": partial(samplers.GPSampler, n_startup_trials=warm, deterministic_objective=True),
        "nsga2": samplers.NSGAIISampler,
        "random": samplers.RandomSampler,
    }
    if name not in known:
        raise ConfigError(f"search.sampler is {name!r}; choose one of {', '.join(known)}.")
    return known[name](seed=seed)

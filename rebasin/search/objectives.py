"""What a search makes small: one figure or several, with batches to search on, to choose by and to judge on, cut into
pieces small enough to give up on a bad merge early, and to resample for confidence intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ..data.prompts import read_prompts
from ..errors import ConfigError, DataError
from ..files import config_dir
from ..integrations.signatures import composed
from ..objectives import Reward, checked
from ..objectives.base import imported
from ..tasks import Task, load_task
from ..types import check_options
from .assessment import units_of

RUN = "run"
"""The objective of the run itself, objective=..."""

HIGHER = ("accuracy", "reward")
"""Figures that are better when higher; a search makes them small with a minus before them."""


def samples_in(batch: Any) -> int:
    """How many samples a batch has: the length of its first tensor that has one."""
    for value in batch.values() if isinstance(batch, Mapping) else batch:
        if isinstance(value, Tensor) and value.ndim > 0:
            return len(value)
    raise DataError("A batch has no tensor whose first axis could be the samples.")


def cut(batches: Sequence[Any], size: int) -> list[Any]:
    """The same samples in the same order, in batches of `size` (the last of each batch may be smaller).

    What does not have one entry for each sample (the text states of the empty prompt) stays whole.
    """
    pieces = []
    for batch in batches:
        total = samples_in(batch)
        pieces += [_part(batch, start, size, total) for start in range(0, total, size)]
    return pieces


def deal(pieces: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """The pieces in two parts, the second of them `share` of all: every so many-th piece, at least one each.

    Raises:
        DataError: there are fewer than two pieces.
    """
    if len(pieces) < 2:
        raise DataError(
            f"A search needs two batches or more, one to search on and one to choose by, but there is {len(pieces)};"
            " give it more data, or smaller batches with search.batch (search.unit for search.data=heldout)."
        )
    number = min(max(1, round(share * len(pieces))), len(pieces) - 1)
    chosen = {round((i + 1) * len(pieces) / number) - 1 for i in range(number)}
    first = [piece for i, piece in enumerate(pieces) if i not in chosen]
    return first, [pieces[i] for i in sorted(chosen)]


@dataclass(frozen=True, eq=False)
class SearchObjective:
    """One figure that is to be small.

    Attributes:
        name: what it is called in tables.
        measure: (model, batch) -> its mean over the batch, in eval mode without gradients.
        search, choose, heldout: batches; the search sees the first, the winner among its best is chosen by the second,
            and the third is for the report.
        sign: -1 if `measure` gives minus what `name` says (an accuracy, a reward).
    """

    name: str
    measure: Callable[[nn.Module, Any], float]
    search: Sequence[Any]
    choose: Sequence[Any]
    heldout: Sequence[Any]
    sign: int = 1

    @property
    def units(self) -> tuple[list[int], list[Hashable]]:
        """Of the held-out batches: how many samples each has, and what is drawn at once in a bootstrap."""
        return [samples_in(batch) for batch in self.heldout], units_of(self.heldout)

    def losses(self, model: nn.Module, split: str) -> list[float]:
        """One for each batch of a split."""
        return [self.measure(model, batch) for batch in getattr(self, split)]

    def mean(self, losses: Sequence[float], split: str) -> float:
        """The mean over samples of what `losses` says for the first batches of a split."""
        sizes = [samples_in(batch) for batch in getattr(self, split)[: len(losses)]]
        return sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)


def load_objectives(cfg: DictConfig, task: Task, options: DictConfig) -> tuple[SearchObjective, ...]:
    """The objectives that `options` (cfg.search, cfg.methods) names, on the data of the task.

    Each entry is `run` (that of objective=...), `run.FIGURE` (another figure of it, such as accuracy), the name of a
    config of the group `objective`, a mapping with such a name and options, or the path package.module:function of a
    function (model, batch) -> loss on the run's batches.

    Raises:
        ConfigError: there is no such objective or figure, or it does not fit the model.
    """
    entries = list(options.objectives)
    if not entries:
        raise ConfigError("The list of objectives is empty; it takes at least one, for example [run].")
    found = tuple(_named(cfg, task, options, entry) for entry in entries)
    names = [objective.name for objective in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"objectives has {names[0]!r} twice; each objective counts once.")
    return found


def _named(cfg: DictConfig, task: Task, options: DictConfig, entry: Any) -> SearchObjective:
    if isinstance(entry, DictConfig):
        own = {str(key): value for key, value in entry.items()}
        name = own.pop("name", None)
        if name is None:
            raise ConfigError("An entry of the objectives has no name; write {name: reward, scorer: ...}.")
        return _other(cfg, options, str(name), own)
    if entry == RUN or str(entry).startswith(f"{RUN}."):
        name = cfg.objective.name if "objective" in task.reads else "loss"  # else it is the model's own
        return _of_task(cfg, task, options, name, str(entry).partition(".")[2] or "loss")
    if ":" in str(entry):
        return _of_path(task, options, str(entry))
    return _other(cfg, options, str(entry), {})


def _other(cfg: DictConfig, options: DictConfig, name: str, given: Mapping[str, Any]) -> SearchObjective:
    """An objective of the config group, beside that of the run: it brings its own batches."""
    folder = config_dir() / "objective"
    if not (folder / f"{name}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("[!_]*.yaml")))
        raise ConfigError(
            f"objectives names {name!r}; it takes run, run.FIGURE, package.module:function, or one of {known}."
        )
    own = composed([f"objective={name}"]).objective
    check_options(f"objective={name}", given, {str(key): None for key in own})
    rest = {key: value for key, value in cfg.items() if key != "objective"}
    changed = OmegaConf.merge(rest, {"objective": own}, {"objective": dict(given)})
    assert isinstance(changed, DictConfig)
    return _of_task(changed, load_task(changed), options, name, "loss")


def _of_task(cfg: DictConfig, task: Task, options: DictConfig, name: str, figure: str) -> SearchObjective:
    objective = task.objective
    rewarded = isinstance(objective, Reward)
    if rewarded and figure == "loss":
        figure = "reward"
    sign = -1 if figure in HIGHER else 1

    def measure(model: nn.Module, batch: Any) -> float:
        figures = objective.evaluate(model, [batch])
        if figure not in figures:
            raise ConfigError(
                f"objectives names run.{figure}, but objective={name} has {', '.join(figures)}."
            )
        return sign * figures[figure]

    called = name if figure in ("loss", "reward") else figure
    batches = _prompted(cfg, task, options) if rewarded else task.batches
    # An image is a unit of its own, so that the bootstrap draws prompts.
    return SearchObjective(called, measure, *_splits(options, batches, 1 if rewarded else options.unit), sign)


def _of_path(task: Task, options: DictConfig, path: str) -> SearchObjective:
    objective, name = checked(imported("objective", path)), path.rpartition(":")[2]

    def measure(model: nn.Module, batch: Any) -> float:
        return objective.evaluate(model, [batch])["loss"]

    return SearchObjective(name, measure, *_splits(options, task.batches, options.unit))


def _splits(
    options: DictConfig, batches: Mapping[str, Sequence[Any]], unit: int
) -> tuple[list[Any], list[Any], list[Any]]:
    """Batches to search on, to choose by and to judge on."""
    if options.data == "heldout":
        searched, judged = deal(cut(batches["heldout"], max(unit, 1)), 0.5)
        return *deal(searched, options.choose), judged
    searched, choosing = deal(cut(batches["train"], options.batch), options.choose)
    return searched, choosing, cut(batches["heldout"], unit)


def _prompted(cfg: DictConfig, task: Task, options: DictConfig) -> dict[str, Sequence[Any]]:
    """Prompts of a reward: the judge has prompts of its own, which the search has not seen."""
    maker, own = task.maker, cfg.objective
    assert maker is not None  # it has a reward
    prompts = list(maker.chosen(own.prompts))
    file, kept = options.heldout_prompts, float(options.heldout_share)
    if file is not None:
        seen, unseen = prompts, read_prompts(file)
    else:
        if not 0 < kept < 1 or len(prompts) < 2:
            raise ConfigError(
                f"heldout_share is {kept} and there are {len(prompts)} prompts; it takes a share between 0 and 1"
                " of two prompts or more."
            )
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(cfg.seed)).tolist()
        number = min(max(1, round(kept * len(prompts))), len(prompts) - 1)
        seen = [prompts[i] for i in sorted(order[number:])]
        unseen = [prompts[i] for i in sorted(order[:number])]
    size = own.batch_size
    return {
        "train": maker.batches(seen, count=own.train, batch_size=size, seed=cfg.seed + 1),
        "heldout": maker.batches(unseen, count=own.heldout, batch_size=size, seed=cfg.seed),
    }


def _part(batch: Any, start: int, size: int, total: int) -> Any:
    if isinstance(batch, Mapping):
        return {key: _sliced(value, start, size, total) for key, value in batch.items()}
    return type(batch)(_sliced(value, start, size, total) for value in batch)


def _sliced(value: Any, start: int, size: int, total: int) -> Any:
    sized = isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.ndim > 0)
    return value[start : start + size] if sized and len(value) == total else value

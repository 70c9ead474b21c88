"""What matching returns, and what it needs to continue after an interruption: plain values."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError
from ..spec import Permutation, PermutationSpec, displaced

STATE_FORMAT = "1"


class Found:
    """What all results have that found one permutation of B."""

    permutation: Permutation

    @property
    def moved(self) -> int:
        """Neurons that are not where they were in B."""
        return self.permutation.moved()

    @property
    def moved_per_group(self) -> dict[str, int]:
        """The same by group name; groups of one name are added up."""
        moved: dict[str, int] = {}
        for group in self.permutation.spec:
            own = displaced(self.permutation.index[cell.name] for cell in group.cells)
            moved[group.name] = moved.get(group.name, 0) + own
        return moved


@dataclass(frozen=True)
class Update:
    """One group's update: what the objective gained (never negative) and how many neurons changed place."""

    group: str
    gain: float
    moved: int


@dataclass(frozen=True)
class Sweep:
    """One pass over the groups; number 0 is the start. `updates` has the groups that had to be looked at.

    `objective` and `moved` (neurons not where they were in B) are those at its end, `seconds` is its own
    time.
    """

    number: int
    objective: float
    moved: int
    updates: tuple[Update, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class MatchResult(Found):
    """An alignment of B to A: `permutation.apply(state_b)` is B brought to A.

    Attributes:
        permutation: the best that was found.
        objective: `sum <A, pi(B)>` over the parameters that the spec permutes (of unit vectors if
        normalised).
        history: the sweeps of the attempt that found it.
        converged: no single group can be improved any more: each was looked at after the last change of what
            its costs depend on. False if `max_sweeps` ended the search.
        seconds: wall time, including that before an interruption.
        initial_objective, distance_before: without a permutation, as a naive merge would have it.
        distance_before, distance_after: |A - B| and |A - pi(B)| over the same parameters (never normalised).
        sweeps: how many sweeps the history has, the start not counted.
        restarts: the objective that each attempt reached, in order.
    """

    permutation: Permutation
    objective: float
    history: tuple[Sweep, ...]
    converged: bool
    seconds: float
    initial_objective: float
    distance_before: float
    distance_after: float
    sweeps: int
    restarts: tuple[float, ...]

    @property
    def spread(self) -> float:
        """The difference between the best and the worst restart's objective: how far the end depends on
        chance.
        """
        return max(self.restarts) - min(self.restarts)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the permutation, as JSON can have it."""
        return {
            "objective": self.objective,
            "initial_objective": self.initial_objective,
            "distance_before": self.distance_before,
            "distance_after": self.distance_after,
            "converged": self.converged,
            "sweeps": self.sweeps,
            "moved": self.moved,
            "moved_per_group": dict(self.moved_per_group),
            "restarts": list(self.restarts),
            "spread": self.spread,
            "seconds": self.seconds,
            "history": [asdict(sweep) for sweep in self.history],
        }


@dataclass(frozen=True)
class Attempt:
    """One descent, finished or not."""

    permutation: Permutation
    objective: float
    history: tuple[Sweep, ...]
    converged: bool


@dataclass(frozen=True)
class MatchState:
    """Where matching stands after a finished sweep; given to `resume_from`, it ends as if never interrupted.

    Attributes:
        options: what must not change between interruption and continuation, weights included.
        current: the descent under way.
        dirty: the numbers of the groups that are still to be looked at.
        finished: the objectives of the restarts done before it, and `best` the best of these.
        seconds: wall time so far.
    """

    options: Mapping[str, str]
    current: Attempt
    dirty: tuple[int, ...]
    finished: tuple[float, ...] = ()
    best: Attempt | None = None
    seconds: float = 0.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """One safetensors file, written beside the target and renamed."""
        target = Path(path)
        attempts = {"current": self.current} | ({"best": self.best} if self.best is not None else {})
        tensors = {
            f"{which}/{cell}": torch.from_numpy(index.astype(np.int32))
            for which, attempt in attempts.items()
            for cell, index in attempt.permutation.index.items()
        }
        plain = {
            "options": dict(self.options),
            "dirty": self.dirty,
            "finished": self.finished,
            "seconds": self.seconds,
        }
        for which, attempt in attempts.items():
            plain[which] = {
                "objective": attempt.objective,
                "converged": attempt.converged,
                "history": [asdict(sweep) for sweep in attempt.history],
            }
        header = {
            "matching": STATE_FORMAT,
            "spec": self.current.permutation.spec.to_json(),
            "state": json.dumps(plain),
        }
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata=header)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MatchState:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is no such state or is damaged.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                header, names = file.metadata() or {}, file.keys()
                if header.get("matching") != STATE_FORMAT:
                    raise CheckpointError(
                        f"{path} holds no interrupted matching that this version can continue."
                    )
                tensors = {key: file.get_tensor(key).numpy().astype(np.int64) for key in names}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} can't be read as an interrupted matching: {error}.") from error
        spec = PermutationSpec.from_json(header["spec"])
        plain = json.loads(header["state"])

        def attempt(which: str) -> Attempt:
            index = {name: tensors[f"{which}/{name}"] for name in spec.cells}
            data = plain[which]
            history = tuple(
                Sweep(**(sweep | {"updates": tuple(Update(**u) for u in sweep["updates"])}))
                for sweep in data["history"]
            )
            return Attempt(Permutation(spec, index), data["objective"], history, data["converged"])

        state = cls(plain["options"], attempt("current"), tuple(plain["dirty"]), tuple(plain["finished"]))
        return replace(state, best=attempt("best") if "best" in plain else None, seconds=plain["seconds"])

"""What aligning many models returns, and what it needs to continue after an interruption: plain values."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import load_safetensors, save_safetensors
from ..errors import CheckpointError
from ..spec import Permutation, PermutationSpec

STATE_FORMAT = "1"


@dataclass(frozen=True)
class Step:
    """One model's update: how many of its neurons changed place (0: it is best as it was), and the time."""

    model: int
    moved: int
    seconds: float


@dataclass(frozen=True)
class Pass:
    """One pass over the models; number 0 is the start. `distance` is that at its end (see `ManyResult`)."""

    number: int
    distance: float
    moved: int = 0
    steps: tuple[Step, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class ManyResult:
    """N models in one arrangement of their neurons, and their mean.

    Attributes:
        permutations: `permutations[i].apply(states[i])` is model i as it went into the mean.
        merged: the weighted mean of all, name -> tensor in the first model's types; every tensor of the
            models, not only those that the spec permutes.
        objective: `sum_(i<j) w_i w_j <pi_i(theta_i), pi_j(theta_j)>` over the parameters that the spec
            permutes; with two models of weight 1 that of weight matching.
        distance: root of the weighted mean of |pi_i(theta_i) - mean|^2 over the same parameters, and
            `distance_before` without any permutation.
        history: the passes; `passes` how many without the start.
        converged: no model can be brought closer to the mean of the others, by matching, than it is.
        moved: neurons that are not where they were, over all models.
        weights: as used, with sum 1.
        pivot: the model to which all others were matched, or None.
        seconds: wall time, including that before an interruption.
    """

    permutations: tuple[Permutation, ...]
    merged: dict[str, Tensor]
    objective: float
    distance: float
    distance_before: float
    history: tuple[Pass, ...]
    converged: bool
    moved: int
    weights: tuple[float, ...]
    seconds: float
    pivot: int | None = None

    @property
    def passes(self) -> int:
        return len(self.history) - 1

    def to_dict(self) -> dict[str, Any]:
        """Everything but the permutations and the merged weights, as JSON can have it."""
        return {
            "models": len(self.permutations),
            "weights": list(self.weights),
            "pivot": self.pivot,
            "objective": self.objective,
            "distance": self.distance,
            "distance_before": self.distance_before,
            "passes": self.passes,
            "converged": self.converged,
            "moved": self.moved,
            "seconds": self.seconds,
            "history": [asdict(one) for one in self.history],
        }


@dataclass(frozen=True)
class ManyState:
    """Where the merge stands after a model's update; given to `resume_from`, it ends as if never interrupted.

    Attributes:
        options: what must not change between interruption and continuation, the models included.
        begun: each model's permutation when the pass began, None for one not in the mean then; `current` the
            same now. Both are needed: the mean is rebuilt from the files in the order in which it was made,
            so that it is the same to the last bit.
        order, done: the order of the pass under way and how many of its models are done.
        settled: models that are known to be best where they are as long as no other moves.
        matches: how many matchings were made.
        history, steps: finished passes, and the updates of the one under way.
        distance_before: without any permutation.
        seconds: wall time so far.
    """

    options: Mapping[str, str]
    begun: tuple[Permutation | None, ...]
    current: tuple[Permutation | None, ...]
    order: tuple[int, ...]
    done: int
    settled: frozenset[int]
    matches: int
    history: tuple[Pass, ...]
    steps: tuple[Step, ...]
    distance_before: float
    seconds: float

    def save(self, path: str | os.PathLike[str]) -> None:
        """One safetensors file of int32 indices, written beside the target and renamed."""
        tensors: dict[str, Tensor] = {}
        spec: PermutationSpec | None = None
        for which in ("begun", "current"):
            for i, permutation in enumerate(getattr(self, which)):
                if permutation is not None:
                    spec = permutation.spec
                    for cell, index in permutation.index.items():
                        tensors[f"{which}/{i}/{cell}"] = torch.from_numpy(index.astype(np.int32))
        assert spec is not None  # there is a first model in the mean before anything is to be saved
        plain = {
            "options": dict(self.options),
            "present": {
                which: [i for i, p in enumerate(getattr(self, which)) if p is not None]
                for which in ("begun", "current")
            },
            "order": self.order,
            "done": self.done,
            "settled": sorted(self.settled),
            "matches": self.matches,
            "history": [asdict(one) for one in self.history],
            "steps": [asdict(step) for step in self.steps],
            "distance_before": self.distance_before,
            "seconds": self.seconds,
        }
        header = {"many": STATE_FORMAT, "spec": spec.to_json(), "state": json.dumps(plain)}
        save_safetensors(path, tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ManyState:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is no such state or is damaged.
        """
        file = load_safetensors(Path(path))
        if file.metadata.get("many") != STATE_FORMAT:
            raise CheckpointError(f"{path} holds no interrupted merge that this version can continue.")
        spec = PermutationSpec.from_json(file.metadata["spec"])
        plain = json.loads(file.metadata["state"])

        def permutations(which: Literal["begun", "current"]) -> tuple[Permutation | None, ...]:
            present = set(plain["present"][which])
            return tuple(
                Permutation(spec, {c: file[f"{which}/{i}/{c}"].numpy().astype(np.int64) for c in spec.cells})
                if i in present
                else None
                for i in range(len(plain["order"]))
            )

        try:
            begun, current = permutations("begun"), permutations("current")
        except KeyError as error:
            raise CheckpointError(f"{path} is damaged: {error.args[0]}") from error
        return cls(
            options=plain["options"],
            begun=begun,
            current=current,
            order=tuple(plain["order"]),
            done=plain["done"],
            settled=frozenset(plain["settled"]),
            matches=plain["matches"],
            history=tuple(_pass_from(one) for one in plain["history"]),
            steps=tuple(Step(**step) for step in plain["steps"]),
            distance_before=plain["distance_before"],
            seconds=plain["seconds"],
        )


def _pass_from(data: dict[str, Any]) -> Pass:
    steps = tuple(Step(**step) for step in data["steps"])
    return Pass(data["number"], data["distance"], data["moved"], steps, data["seconds"])

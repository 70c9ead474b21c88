"""What aligning many models returns, and what it needs to continue after an interruption: plain values."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...arguments import typed
from ...errors import CheckpointError, ConfigError
from ...spec import Alignment, Permutation, PermutationSpec
from ...spec.permutation import digest, require_digest
from ...tensors import load_safetensors, save_safetensors
from ...types import State, brief
from ..result import plain
from ..resume_state import ResumeState


@brief
@dataclass(frozen=True)
class Step:
    """One model's update: how many of its neurons changed place (0: it is best as it was), and the time."""

    model: int
    moved: int
    seconds: float


@brief
@dataclass(frozen=True)
class Pass:
    """One pass over the models; number 0 is the start. `distance` is that at its end (see `ManyResult`)."""

    number: int
    distance: float
    moved: int = 0
    steps: tuple[Step, ...] = ()
    seconds: float = 0.0


@brief
@dataclass(frozen=True)
class ManyResult:
    """N models in one arrangement of their neurons, and their mean.

    Attributes:
        method: the one of `many.METHODS` that found them.
        permutations: `permutations[i].apply(states[i])` is model i as it went into the mean.
        merged: the weighted mean of all, name -> tensor in the first model's types; every tensor of the
            models, not only those that the spec permutes. Lazy: a tensor is read from the models, one after
            the other, whenever it is asked for, so keep `dict(result.merged)` or stream it to a file.
        objective: `sum_(i<j) w_i w_j <pi_i(theta_i), pi_j(theta_j)>` over the parameters that the spec
            permutes; with two models of weight 1 that of weight matching.
        distance: root of the weighted mean of |pi_i(theta_i) - mean|^2 over the same parameters, and
            `distance_before` without any permutation.
        history: the passes; `passes` how many without the start.
        converged: no model can be brought closer to the mean of the others, by matching, than it is.
        moved: neurons that are not where they were, over all models.
        weights: as used, with sum 1.
        seconds: wall time, including that before an interruption.
        pivot: the model to which all others were matched, or None.
        details: further figures of the method, as JSON can have them.
    """

    method: str
    permutations: tuple[Permutation, ...]
    merged: Mapping[str, Tensor]
    objective: float
    distance: float
    distance_before: float
    history: tuple[Pass, ...]
    converged: bool
    moved: int
    weights: tuple[float, ...]
    seconds: float
    pivot: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        return len(self.history) - 1

    @typed
    def members(self, states: Sequence[State]) -> list[State]:
        """The models as they went into the mean, each moved when it is read.

        Raises:
            ConfigError: `states` are not as many as were matched.
        """
        if len(states) != len(self.moves):
            raise ConfigError(f"states has {len(states)} models, but {len(self.moves)} were matched.")
        return [move.view(state) for move, state in zip(self.moves, states, strict=True)]

    @property
    def moves(self) -> Sequence[Permutation | Alignment]:
        """What moves each model to the mean."""
        return self.permutations

    def to_dict(self) -> dict[str, Any]:
        """Everything but the permutations and the merged weights, as JSON can have it."""
        own = plain(self, "permutations", "merged", "alignments")
        return {**own, "models": len(self.permutations), "passes": self.passes}


def anchored(permutations: Sequence[Permutation], anchor: int | None) -> tuple[Permutation, ...]:
    """The same arrangement relative to that of model `anchor`, which then does not move; None: as it is."""
    if anchor is None or permutations[anchor].is_identity:
        return tuple(permutations)
    back = permutations[anchor].invert()
    return tuple(back.compose(p) for p in permutations)


@typed
def save_permutations(
    path: str | os.PathLike[str],
    permutations: Sequence[Permutation],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """One safetensors file of int32 indices, "MODEL/CELL", with the spec in its header; what a further model needs
    to join the merge later.
    """
    if not permutations:
        raise ConfigError("There is nothing to save: the list of permutations is empty.")
    tensors = {
        name: torch.from_numpy(index.astype(np.int32)) for name, index in _together(permutations).items()
    }
    header = {"permutations": str(len(permutations)), "spec": permutations[0].spec.to_json()}
    header["digest"] = digest(_together(permutations))
    save_safetensors(path, tensors, {**(metadata or {}), **header})


@typed
def load_permutations(path: str | os.PathLike[str]) -> list[Permutation]:
    """Read what `save_permutations` wrote.

    Raises:
        CheckpointError: the file holds no such permutations, is damaged, or holds an illegal one.
    """
    file = load_safetensors(Path(path))
    told = file.metadata.get("permutations", "")
    if not re.fullmatch("[1-9][0-9]{0,5}", told):
        raise CheckpointError(f"{path} holds no permutations of a merge: its header does not tell how many.")
    spec = PermutationSpec.of_file(file, "permutations of a merge")
    prefixes = [f"{i}/" for i in range(int(told))]
    if len(file) != len(prefixes) * len(spec.cells):
        raise CheckpointError(f"{path} is damaged: its tensors are not the cells of its spec.")
    permutations = [Permutation.read(file, spec, prefix) for prefix in prefixes]
    require_digest(file, _together(permutations))
    return permutations


def _together(permutations: Sequence[Permutation]) -> dict[str, np.ndarray]:
    """The indices of all, named "MODEL/CELL"."""
    return {f"{i}/{cell}": index for i, p in enumerate(permutations) for cell, index in p.index.items()}


@brief
@dataclass(frozen=True)
class ManyState(ResumeState):
    """Where the merge stands after a model's update; given to `resume_from`, it ends as if never interrupted.

    Attributes:
        options: what must not change between interruption and continuation, the models included.
        begun: each model's permutation when the pass began, None for one not in the mean then; `current` the
            same now. Both are needed: the mean is rebuilt from the files in the order in which it was made,
            so that it is the same to the last bit.
        order, done: the order of the pass under way and how many of its models are done.
        dirty: models that may not be best where they are.
        matches: how many matchings were made.
        history, steps: finished passes, and the updates of the one under way.
        distance_before: without any permutation.
        seconds: wall time so far.
    """

    called: ClassVar[str] = "merge"

    begun: tuple[Permutation | None, ...]
    current: tuple[Permutation | None, ...]
    order: tuple[int, ...]
    done: int
    dirty: tuple[int, ...]
    matches: int
    history: tuple[Pass, ...]
    steps: tuple[Step, ...]
    distance_before: float
    seconds: float

"""What a search works on: models in one arrangement, and a model that takes one merge of them after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..merging import MergedState
from ..merging.inputs import same
from ..spec import Alignment
from ..tensors.memory import duplicate
from ..tensors.modules import find_device
from ..types import State
from .candidate import Candidate
from .groups import Groups
from .objectives import SearchObjective
from .space import Space

BASE = "base"


@dataclass(frozen=True, eq=False)
class Inputs:
    """The models of a merge.

    Attributes:
        states: as they are, one for each of `labels`.
        base: their common ancestor, if one was named.
    """

    labels: tuple[str, ...]
    states: tuple[State, ...]
    base: State | None = None

    @property
    def named(self) -> dict[str, State]:
        """Label -> state, the base among them."""
        base = {} if self.base is None else {BASE: self.base}
        return {**dict(zip(self.labels, self.states, strict=True)), **base}

    def moved(self, alignments: Mapping[str, Alignment]) -> Inputs:
        """All of them in the basis of the first."""
        found = self.named
        found |= {n: move.apply(found[n]) for n, move in alignments.items() if not move.is_identity}
        return Inputs(self.labels, tuple(found[label] for label in self.labels), found.get(BASE))


class Evaluator:
    """Loads candidates into one copy of a model, and measures them.

    A tensor that is the same in all inputs is written once, and one whose method, options and weight are those of the
    candidate before is left as it is. So a search that moves one block pays for one block.
    """

    def __init__(
        self,
        model: nn.Module,
        states: Sequence[State],
        objectives: Sequence[SearchObjective] = (),
        *,
        base: State | None = None,
        groups: Groups | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        """
        Args:
            model: the architecture; it is copied.
            states: the inputs, in one basis.
            objectives: what to measure; all are to be small.
            groups: of candidates whose weights are by group.
            device: where the model runs.
        """
        self.model = duplicate(model).eval().requires_grad_(False)
        if device is not None:
            self.model.to(find_device(device))
        self.states, self.base, self.groups, self.seed = tuple(states), base, groups, seed
        self.objectives = tuple(objectives)
        inputs = [*self.states, *([base] if base is not None else [])]
        self._constant = frozenset(
            name for name in states[0] if all(same(states[0][name], other[name]) for other in inputs[1:])
        )
        self._slots = self.model.state_dict()  # shares its memory with the model
        missing = [name for name in self._slots if name not in set(states[0])]
        if missing:
            raise CheckpointError(f"Tensor '{missing[0]}' of the architecture is in none of the models.")
        self._loaded: dict[str, Any] = {}
        self.computed = 0

    def merged(self, candidate: Candidate) -> MergedState:
        """The candidate as a lazy state."""
        return candidate.merged(self.states, base=self.base, groups=self.groups, seed=self.seed)

    def load(self, candidate: Candidate) -> nn.Module:
        """The model with the candidate's weights; it stays the evaluator's own.

        Raises:
            CheckpointError, ConfigError: the merge can't be made of these inputs.
        """
        merged = self.merged(candidate)
        whole = (candidate.method, repr(sorted(candidate.options.items())))
        with torch.no_grad():
            for name, slot in self._slots.items():
                key = True if name in self._constant else (*whole, repr(merged.weights_of(name)))
                if self._loaded.get(name) == key:
                    continue
                # A merge that fails half-way leaves nothing that counts as loaded.
                self._loaded.pop(name, None)
                slot.copy_(merged[name])
                self._loaded[name] = key
                self.computed += 1
        return self.model

    def measure(self, candidate: Candidate, split: str) -> list[list[float]]:
        """A candidate's losses on the batches of a split, for each objective."""
        return self.losses(self.load(candidate), split)

    def losses(self, model: nn.Module, split: str) -> list[list[float]]:
        """Those of the model that is loaded."""
        return [objective.losses(model, split) for objective in self.objectives]

    def means(self, candidate: Candidate, split: str) -> list[float]:
        """Its mean loss over the samples of a split, for each objective."""
        losses = self.measure(candidate, split)
        return [o.mean(own, split) for o, own in zip(self.objectives, losses, strict=True)]

    def load_state(self, state: State) -> nn.Module:
        """The model with the weights of `state`, which is no candidate."""
        self._loaded.clear()
        with torch.no_grad():
            for name, slot in self._slots.items():
                slot.copy_(state[name])
        return self.model


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything that trials need: `inputs` are aligned."""

    inputs: Inputs
    space: Space
    evaluator: Evaluator

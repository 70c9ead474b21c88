"""What a search works on: models in one arrangement, and what may be made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..spec import Permutation
from ..types import State
from .evaluator import Evaluator
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

    def moved(self, permutations: Mapping[str, Permutation]) -> Inputs:
        """All of them in the arrangement of the first."""
        found = self.named
        found |= {n: p.apply(found[n]) for n, p in permutations.items() if not p.is_identity}
        return Inputs(self.labels, tuple(found[label] for label in self.labels), found.get(BASE))


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything that trials need: `inputs` are aligned."""

    inputs: Inputs
    space: Space
    evaluator: Evaluator

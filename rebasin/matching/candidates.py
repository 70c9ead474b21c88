"""Alignments that are cheap to find, by name, and which of several is best by what a merge computes.

No single one of them is best everywhere: weights alone can make a merge worse than not aligning, and so can each
statistic of activations. So several are found and each is measured, on batches that none of them has learned from and
no report uses. Not aligning is the first of them, and only what is strictly better takes its place: by that measure the
best is never worse. `auto_matching` returns it, and searches by the loss start there (`init="best"`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..errors import RebasinError, SpecMismatchError
from ..objectives import LossFunction, Objective
from ..spec import Alignment, Permutation, PermutationSpec
from ..types import brief
from .activations.hybrids import activation_and_weight, activation_then_weight
from .activations.matching import activation_matching
from .weights.matching import weight_matching

Named = Literal[
    "identity",
    "weight_matching",
    "activation_matching",
    "activation_covariance",
    "activation_outputs",
    "output_covariance",
    "activation_then_weight",
    "activation_and_weight",
    "best",
]
Start = Named | Permutation

ACTIVATIONS: Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
    "activation_matching": (activation_matching, {}),
    "activation_covariance": (activation_matching, {"statistic": "covariance"}),
    "activation_outputs": (activation_matching, {"reads": "outputs"}),
    "output_covariance": (
        activation_matching,
        {"reads": "outputs", "statistic": "covariance"},
    ),
    "activation_then_weight": (activation_then_weight, {}),
    "activation_and_weight": (activation_and_weight, {}),
}
"""Those that look at activations: the function, and in what it differs from its defaults."""


def candidates(start: Start = "best") -> tuple[Start, ...]:
    """Those of which the one with the lowest loss is to be taken: "best" stands for all of the others."""
    return get_args(Named)[:-1] if start == "best" else (start,)


def candidate(
    name: Start,
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    objective: Objective | LossFunction,
    batches: Sequence[Any],
    seed: int,
    device: torch.device,
) -> Permutation:
    """The permutation that one of the `candidates` stands for: what the algorithm of that name finds by default.

    Raises:
        SpecMismatchError: a given permutation was made for another spec, or is not legal for it.
        ConfigError: there is no start of that name.
    """
    if isinstance(name, Permutation):
        if not spec.contains(name):
            raise SpecMismatchError(
                "The initial permutation is not legal for this spec: it was made for another architecture."
            )
        return Permutation(spec, {cell: index.copy() for cell, index in name.index.items()})
    if name == "identity":
        return spec.identity()
    if name == "weight_matching":
        return weight_matching(
            spec, model_a.state_dict(), model_b.state_dict(), seed=seed, device=device
        ).permutation
    function, options = ACTIVATIONS[name]
    more = {"fallback_to_weights": True} if function is activation_matching else {}
    found = function(
        spec, model_a, model_b, batches, objective=objective, seed=seed, device=device, **options, **more
    )
    return found.permutation


@brief
@dataclass(frozen=True)
class Tried:
    """One candidate.

    Attributes:
        name: of the candidate; "naive" is no alignment.
        loss: what it was measured by, lower is better; not a number where it was not.
        moved: neurons that are not where they were in B.
        seconds: wall time of finding and measuring it.
        same_as: the name of an earlier one that is the same alignment, "" if there is none.
        why: the sentence of the error that kept it from being found, "" if it was found.
    """

    name: str
    loss: float
    moved: int
    seconds: float
    same_as: str = ""
    why: str = ""


class Comparison:
    """Finds and measures one candidate after another.

    Attributes:
        found: what was found, the identity in the place of what could not be; `tried` says how good each is.
    """

    def __init__(
        self,
        score: Callable[[Any], float],
        found: Sequence[Permutation] = (),
        tried: Sequence[Tried] = (),
    ) -> None:
        """`score`: the measure of a permutation or an alignment. Of an interrupted comparison what it has `found`."""
        self._score = score
        self.found: list[Any] = list(found)
        self.tried = list(tried)

    def add(self, name: str, make: Callable[[], Permutation | Alignment], instead: Permutation) -> None:
        """Measure what `make` finds; if it raises one of our errors, note its sentence, and `instead` stands there."""
        began = perf_counter()
        try:
            found = make()
            same = next(
                (i for i, one in enumerate(self.found) if one == found and not self.tried[i].why), None
            )
            loss = self._score(found) if same is None else self.tried[same].loss
        except RebasinError as error:
            row = Tried(name, math.nan, 0, perf_counter() - began, why=str(error))
            found = instead
        else:
            earlier = "" if same is None else self.tried[same].name
            row = Tried(name, loss, found.moved(), perf_counter() - began, earlier)
        self.found.append(found)
        self.tried.append(row)

    @property
    def best(self) -> int:
        """The number of the best, of equal ones the first; what is no finite number is worse than all others."""
        losses = [row.loss if math.isfinite(row.loss) else math.inf for row in self.tried]
        return losses.index(min(losses)) if losses else 0


def start_of(
    init: Start,
    score: Callable[[Permutation], float],
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    objective: Objective | LossFunction,
    batches: Sequence[Any],
    seed: int,
    device: torch.device,
) -> Permutation:
    """Where a search starts: at a `candidate`, or ("best") at that of all of them with the lowest `score`.

    Raises:
        SpecMismatchError, ConfigError: as of `candidate`, where there is one only.
    """
    data = spec, model_a, model_b, objective, batches, seed, device
    if init != "best":
        return candidate(init, *data)
    several = Comparison(score)
    for name in candidates():
        several.add(str(name), partial(candidate, name, *data), spec.identity())
    return several.found[several.best]

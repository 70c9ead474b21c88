"""Aligning more than two checkpoints: MergeMany, component by component."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..jobs.resume import Resume
from ..matching.many.methods import match_to_mean
from ..spec import PermutationSpec
from ..types import Progress
from .alignment import Alignment, Matched, align_all, joined, key_of, named, state_of
from .request import Request

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint
    from ..reporting.console import Console

FIGURES = ("distance", "distance_before", "objective", "converged", "passes", "seconds")


@dataclass(frozen=True, eq=False)
class Many:
    """How the neurons of N models come into the order of the first: an alignment each; the first's is the identity.

    `figures`: component -> FIGURES of the merge, with "neurons" and "moved" (of all models).
    """

    each: tuple[Alignment, ...]
    figures: Mapping[str, Mapping[str, Any]]
    reused: bool = False

    @property
    def moved(self) -> int:
        return sum(one.moved for one in self.each)

    def told(self) -> str:
        return ", ".join(f"{n} moved {f['moved']:,} in {f['passes']} passes" for n, f in self.figures.items())

    @property
    def specs(self) -> Mapping[str, PermutationSpec]:
        return self.each[0].specs

    def say(self, console: Console) -> None:
        """The first two answers."""
        from .session import answer

        text = "The symmetries are proved, so each model computes what it did."
        answer(console, "Is it legal?", "Yes", "green", text)
        if not self.moved:
            text = f"All {len(self.each)} models agree, so this is the plain merge."
            return answer(console, "Did anything move?", "No", "yellow", text)
        before = sum(f["distance_before"] ** 2 for f in self.figures.values()) ** 0.5
        after = sum(f["distance"] ** 2 for f in self.figures.values()) ** 0.5
        text = f"{self.moved:,} neurons; the models' distance to their mean fell from {before:.4g} to {after:.4g}."
        answer(console, "Did anything move?", "Yes", "green", text)


def file_of(target: Path, number: int) -> Path:
    """Where the permutation of model `number` (from 0) is kept."""
    stem = target.name.removesuffix(".permutation.safetensors")
    return target.with_name(f"{stem}.permutation-{number + 1}.safetensors")


def align_many(
    models: Sequence[Checkpoint],
    specs: Mapping[str, PermutationSpec],
    request: Request,
    target: Path,
    hashes: Sequence[str],
    weights: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> Many:
    """Bring all models into the order of the first, or read what an earlier run has found for the same ones.

    Models are opened one at a time; what is found is kept beside `target`, a file a model, unfinished work too.
    """

    def match(name: str, spec: PermutationSpec, resume: Resume) -> Matched:
        result = match_to_mean(
            spec,
            [state_of(model, name, spec) for model in models],
            weights=weights,
            seed=request.seed,
            match={"init": request.start, "device": request.device, "max_sweeps": request.max_sweeps},
            progress=named(progress, name),
            **resume.arguments(match_to_mean),
        )
        told = {figure: getattr(result, figure) for figure in FIGURES}
        return list(result.permutations[1:]), told | {"neurons": spec.neurons, "moved": result.moved}

    key = key_of(request, [*hashes, json.dumps(list(weights or ()))], specs)
    files = [file_of(target, i) for i in range(1, len(models))]
    first = Alignment(joined({name: spec.identity() for name, spec in specs.items()}), specs, {})
    each = align_all(files, target, key, specs, match)
    return Many((first, *each), each[0].figures, each[0].reused)

"""Aligning more than two checkpoints: MergeMany, component by component."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters import union
from ..jobs.resume import Resume
from ..spec import Permutation, PermutationSpec
from ..types import Progress
from .alignment import JOINT, Alignment, Options, Unfinished, _named, reuse, state_of

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

    def told_by_component(self) -> dict[str, Any]:
        """What the header says about it."""
        specs = self.each[0].specs
        return {name: {"spec": specs[name].hash, **figures} for name, figures in self.figures.items()}

    def say(self, console: Console) -> None:
        """The first two answers."""
        from .session import answer

        answer(
            console,
            "Is it legal?",
            "Yes",
            "green",
            "The symmetries are proved, so each model computes what it did.",
        )
        n = len(self.each)
        if not self.moved:
            answer(
                console,
                "Did anything move?",
                "No",
                "yellow",
                f"All {n} models agree, so this is the plain merge.",
            )
            return
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
    options: Options,
    target: Path,
    hashes: Sequence[str],
    weights: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> Many:
    """Bring all models into the order of the first, or read what an earlier run has found for the same ones.

    Models are opened one at a time; what is found is kept beside `target`, a file a model, unfinished work too.
    """
    from ..matching.many.methods import match_to_mean

    key = options.key([*hashes, json.dumps(list(weights or ()))], specs)
    files = [file_of(target, i) for i in range(1, len(models))]
    old = [reuse(file, key, specs) for file in files]
    first = Alignment(_identity(specs), specs, {})
    if None not in old:
        each = [first, *(one for one in old if one is not None)]
        return Many(tuple(each), each[1].figures, reused=True)
    found: list[dict[str, Permutation]] = [{} for _ in models]
    figures: dict[str, dict[str, Any]] = {}
    kept = Unfinished(target, key)
    for name, spec in specs.items():
        finished = [kept.load(f"{name}-{i}", spec) for i in range(len(models))]
        if None not in finished:
            permutations = [one[0] for one in finished if one is not None]
            figures[name] = next(one[1] for one in finished if one is not None)
        else:
            resume = Resume(kept.path(name, "matching"), wanted=True)
            result = match_to_mean(
                spec,
                [state_of(model, name, spec) for model in models],
                weights=weights,
                seed=options.seed,
                match={"init": options.start, "device": options.device, "max_sweeps": options.max_sweeps},
                progress=_named(progress, name),
                **resume.arguments(match_to_mean),
            )
            permutations = list(result.permutations)
            figures[name] = {f: getattr(result, f) for f in FIGURES}
            figures[name] |= {"neurons": spec.neurons, "moved": result.moved}
            for i, permutation in enumerate(permutations):
                kept.save(f"{name}-{i}", permutation, figures[name])
            resume.finish()
        for own, permutation in zip(found, permutations, strict=True):
            own[name] = permutation
    each = [first]
    for file, own in zip(files, found[1:], strict=True):
        whole = union({"" if name == JOINT else name: p for name, p in own.items()})
        whole.save(file, {"key": key, "figures": json.dumps(figures)})
        each.append(Alignment(whole, specs, figures, file))
    kept.clear()
    return Many(tuple(each), figures)


def _identity(specs: Mapping[str, PermutationSpec]) -> Permutation:
    return union({"" if name == JOINT else name: spec.identity() for name, spec in specs.items()})

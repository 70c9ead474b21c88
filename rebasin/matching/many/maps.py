"""Many models in the basis of the first, by linear maps beside permutations: what no permutation brings together, the
exact symmetries of the architecture may.

The first model stays. Each further one is brought to the mean of those before it, by the loss between the two or by the
weights alone, and joins it; so for two models the merge is the midpoint that `learned_matching` finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn

from ...arguments import Seed, check_values, typed
from ...errors import ConfigError
from ...objectives import LossFunction, Objective
from ...spec import Alignment, Permutation, PermutationSpec
from ...tensors.modules import loaded
from ...types import Progress, ProgressEvent, arguments_of, brief, check_options, is_number, tell, within
from ..maps.learned import learned_matching
from ..maps.matching import weight_alignment
from .ends import conclude, first_distance
from .models import Models, Source, mean_of
from .result import ManyResult, Pass, Step

By = Literal["loss", "weights"]

SPAN = 0.1
"""A learned map is asked for at shares of the joining model this far from that which it gets, on both sides."""


@brief
@dataclass(frozen=True)
class ManyMapsResult(ManyResult):
    """N models in one basis: `alignments[i].apply(states[i])` is model i as it went into the mean.

    Distances are those of the weights as they are, `permutations` are those of the alignments.
    """

    alignments: tuple[Alignment, ...] = field(kw_only=True)

    @property
    def moves(self) -> Sequence[Permutation | Alignment]:
        return self.alignments


@typed
def match_by_maps(
    spec: PermutationSpec,
    states: Sequence[Source],
    model: nn.Module | None = None,
    objective: Objective | LossFunction | None = None,
    batches: Sequence[Any] | None = None,
    *,
    by: By = "loss",
    heldout: Sequence[Any] | None = None,
    weights: Sequence[float] | None = None,
    match: Mapping[str, Any] | None = None,
    seed: Seed = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> ManyMapsResult:
    """Bring N models into the basis of the first by permutations and maps, and average them.

    All models are in memory. Arguments and errors are those of `match_to_mean` and of `learned_matching`.

    Args:
        model: the architecture; its weights are left as they are. Of "loss" alone, as are the next two.
        objective, batches, heldout: see `learned_matching`.
        by: "loss" learns the maps; "weights" takes those that are closest.
        match: options of `learned_matching` (`steps`, `kinds`, `init`, ...) or of `weight_alignment`.
    """
    models = Models(spec, states, weights)
    before = first_distance(models)
    check_maps_options(by, match)
    if by == "loss" and (model is None or objective is None or batches is None):
        raise ConfigError("Maps are learned by a loss: give model, objective and batches, or by='weights'.")
    moved = [dict(models.open(0))]
    alignments, steps, converged = [Alignment.of(spec.identity())], [], True
    for i in range(1, len(models)):
        began, state, held = perf_counter(), dict(models.open(i)), sum(models.weights[: i + 1])
        mean = {
            name: mean_of([one[name] for one in moved], models.weights[:i]) if is_number(t.dtype) else t
            for name, t in moved[0].items()
        }

        def listen(event: ProgressEvent, i: int = i) -> None:
            if progress is not None:
                progress(within(event, f"model {i + 1}: {event['stage']}"))

        options = {**(match or {}), "seed": seed, "progress": listen}
        if by == "weights":
            found = weight_alignment(spec, mean, state, **options)
        else:
            assert model is not None and objective is not None and batches is not None
            share = models.weights[i] / held
            found = learned_matching(
                spec, loaded(model, mean), loaded(model, state), objective, batches,
                heldout=heldout, device=device, lam_low=max(0.0, share - SPAN), lam_high=min(1.0, share + SPAN),
                **options,
            )  # fmt: skip
        alignments.append(found.as_alignment)
        moved.append(found.as_alignment.apply(state))
        converged &= found.converged
        steps.append(Step(i, found.moved, perf_counter() - began))
        tell(
            progress, "match by maps", i, len(models) - 1, model=i, moved=found.moved, seconds=models.seconds
        )
    still = [spec.identity()] * len(models)
    history = Pass(0, before), Pass(1, nan, sum(s.moved for s in steps), tuple(steps), models.seconds)
    arranged = Models(spec, moved, weights)
    first_distance(arranged)
    whole = conclude("maps", arranged, still, history, converged=converged)
    permutations = tuple(one.permutation for one in alignments)
    told = {name: getattr(whole, name) for name in ManyResult.__dataclass_fields__}
    told |= {"permutations": permutations, "distance_before": before, "seconds": models.seconds}
    told |= {"moved": sum(p.moved() for p in permutations)}
    return ManyMapsResult(**told, alignments=tuple(alignments))


def check_maps_options(by: By, match: Mapping[str, Any] | None) -> None:
    """Look at the options of the matchings of two models that `match_by_maps` makes.

    Raises:
        ConfigError: there is no such option, or it can't be had here, or not this value.
    """
    work = learned_matching if by == "loss" else weight_alignment
    own = ("lam_low", "lam_high", "seed", "progress", "heldout", "device", "checkpoint", "resume_from")
    what = f"The matching by {by}"
    check_options(what, match or {}, arguments_of(work, (*own, *_GIVEN)))
    check_values(work, match or {}, what, "match.")


_GIVEN = ("spec", "state_a", "state_b", "model_a", "model_b", "objective", "batches")

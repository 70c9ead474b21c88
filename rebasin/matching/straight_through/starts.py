"""Where a search that looks at the loss starts: a cheap alignment by name, or a given permutation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from ...errors import ConfigError, SpecMismatchError
from ...objectives import LossFunction, Objective
from ...spec import Permutation, PermutationSpec
from ..activations.hybrids import activation_and_weight, activation_then_weight
from ..activations.matching import activation_matching
from ..weights.matching import weight_matching

Named = Literal[
    "identity",
    "weight_matching",
    "activation_matching",
    "activation_then_weight",
    "activation_and_weight",
    "best",
]
Start = Named | Permutation


def candidates(start: Start) -> tuple[Start, ...]:
    """Those of which the one with the lowest loss is to be taken: "best" stands for all of the others."""
    return get_args(Named)[:-1] if start == "best" else (start,)


def start_from(
    start: Start,
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    objective: Objective | LossFunction,
    batches: Sequence[Any],
    seed: int,
    device: torch.device,
) -> Permutation:
    """The permutation that one of the `candidates` stands for; `objective` and `batches` are the search's.

    Raises:
        SpecMismatchError: a given permutation was made for another spec, or is not legal for it.
        ConfigError: there is no start of that name.
    """
    if isinstance(start, Permutation):
        if not spec.contains(start):
            raise SpecMismatchError(
                "The initial permutation is not legal for this spec: it was made for another architecture."
            )
        return Permutation(spec, {name: index.copy() for name, index in start.index.items()})
    if start == "identity":
        return spec.identity()
    if start == "weight_matching":
        state_a, state_b = model_a.state_dict(), model_b.state_dict()
        return weight_matching(spec, state_a, state_b, init="identity", seed=seed, device=device).permutation
    given = spec, model_a, model_b, batches
    options: dict[str, Any] = {"objective": objective, "seed": seed, "device": device}
    if start == "activation_matching":
        return activation_matching(*given, **options, tokens=None, fallback_to_weights=True).permutation
    if start == "activation_then_weight":
        return activation_then_weight(*given, **options, tokens=None).permutation
    if start == "activation_and_weight":
        return activation_and_weight(*given, **options).permutation
    raise ConfigError(
        f"There is no start {start!r}: init takes {', '.join(get_args(Named))} or a permutation."
    )

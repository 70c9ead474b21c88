"""Where methods start that look at all models at once: by the name of another method, or at given permutations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ...errors import ConfigError, SpecMismatchError
from ...spec import Permutation, PermutationSpec
from .models import Models
from .result import ManyResult, anchored


def check_given(spec: PermutationSpec, given: Sequence[Permutation]) -> None:
    """Raise `SpecMismatchError` if one of the permutations, of models 0, 1, ..., is not legal."""
    for i, permutation in enumerate(given):
        if not spec.contains(permutation):
            raise SpecMismatchError(
                f"The permutation of states[{i}] to start from is none of this spec's: it was made for another"
                f" architecture, or breaks a block structure."
            )


def start_of(
    init: str | Sequence[Permutation],
    models: Models,
    seed: int,
    methods: Mapping[str, Callable[..., ManyResult]],
) -> Sequence[Permutation]:
    """Each model's permutation, in the arrangement of the first: none moves ("identity"), or as one of `methods` ends.

    Raises:
        ConfigError: there is no start of that name.
        SpecMismatchError: given permutations do not go with the models.
    """
    spec, n = models.spec, len(models)
    if init == "identity":
        return [spec.identity()] * n
    if isinstance(init, str):
        if init not in methods:
            names = ", ".join(map(repr, ("identity", *methods)))
            raise ConfigError(f"The init {init!r} is unknown: give {names} or permutations.")
        return methods[init](spec, models.sources, weights=models.weights, seed=seed).permutations
    if len(init) != n:
        raise SpecMismatchError(
            f"The start needs one permutation of this spec for each of the {n} models, not {len(init)}."
        )
    check_given(spec, init)
    return anchored(init, 0)

"""Batches cut into pieces: small enough to give up on a bad merge early, and to resample for confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import DataError


def samples_in(batch: Any) -> int:
    """How many samples a batch has: the length of its first tensor that has one."""
    for value in batch.values() if isinstance(batch, Mapping) else batch:
        if isinstance(value, Tensor) and value.ndim > 0:
            return len(value)
    raise DataError("A batch has no tensor whose first axis could be the samples.")


def cut(batches: Sequence[Any], size: int) -> list[Any]:
    """The same samples in the same order, in batches of `size` (the last of each batch may be smaller).

    What does not have one entry for each sample (the text states of the empty prompt) stays whole.
    """
    pieces = []
    for batch in batches:
        total = samples_in(batch)
        pieces += [_part(batch, start, size, total) for start in range(0, total, size)]
    return pieces


def deal(pieces: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """The pieces in two parts, the second of them `share` of all: every so many-th piece, at least one each.

    Raises:
        DataError: there are fewer than two pieces.
    """
    if len(pieces) < 2:
        raise DataError(
            f"A search needs two batches or more, one to search on and one to choose by, but there is {len(pieces)};"
            " give it more data, or smaller batches with search.batch (search.unit for search.data=heldout)."
        )
    number = min(max(1, round(share * len(pieces))), len(pieces) - 1)
    chosen = {round((i + 1) * len(pieces) / number) - 1 for i in range(number)}
    first = [piece for i, piece in enumerate(pieces) if i not in chosen]
    return first, [pieces[i] for i in sorted(chosen)]


def _part(batch: Any, start: int, size: int, total: int) -> Any:
    if isinstance(batch, Mapping):
        return {key: _sliced(value, start, size, total) for key, value in batch.items()}
    return type(batch)(_sliced(value, start, size, total) for value in batch)


def _sliced(value: Any, start: int, size: int, total: int) -> Any:
    sized = isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.ndim > 0)
    return value[start : start + size] if sized and len(value) == total else value

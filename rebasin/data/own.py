"""Data of a user's own: whatever a function returns, as batches of two splits.

What comes sample by sample (a Dataset, arrays of equal length, a list of samples) is put into batches by torch's own
collation, in its order; a DataLoader, a list of batches, or another iterable brings its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from ..errors import ConfigError, DataError, first_line

SPLITS = ("train", "heldout")

MOST = 5000
"""Batches of data that do not tell how many they are, after which they are taken to have no end."""

HELD = 5
"""Of data that know no splits, every fifth sample is held out, or every fifth batch."""


def splits(
    function: Callable[..., Any], options: Mapping[str, Any], size: int, limit: int | None, name: str
) -> tuple[dict[str, list[Any]], str]:
    """Batches by split, and a remark where the splits were made here.

    Args:
        function: takes `split` ("train" or "heldout"), or `train` (True or False, as torchvision's data sets), or
            neither; then it returns a mapping with both splits, or data of which every fifth sample is held out.
        options: further arguments.
        size: samples in a batch, of data that come sample by sample.
        limit: at most so many batches of each split.
        name: what the data are called in sentences.

    Raises:
        DataError: it fails, or returns something else, or nothing.
    """
    takes = _takes(function)
    if "split" in takes or "train" in takes:
        given = {s: {"split": s} if "split" in takes else {"train": s == "train"} for s in SPLITS}
        made = {split: _called(function, {**own, **options}, name) for split, own in given.items()}
        return {split: batches(value, size, limit, f"{name}, {split},") for split, value in made.items()}, ""
    made = _called(function, options, name)
    if isinstance(made, Mapping) and set(SPLITS) <= set(made):
        return {split: batches(made[split], size, limit, f"{name}, {split},") for split in SPLITS}, ""
    whole = _samples(made)
    every = batches(made, size, None if limit is None else HELD * limit, name) if whole is None else []
    count, what = (len(every), "batch") if whole is None else (len(whole), "sample")  # type: ignore[arg-type]
    if count < HELD:
        raise DataError(
            f"{name} has {count} {what}{'' if count == 1 else 's' if whole is not None else 'es'}"
            f"{'' if whole is not None else f' of {size}'}: of data without splits every fifth is held out, so give at"
            f" least {HELD}{'' if whole is not None else ', or a smaller data.batch_size'}."
        )
    held = range(HELD - 1, count, HELD)
    parts = {"train": [i for i in range(count) if i not in held], "heldout": list(held)}
    if whole is None:
        found = {split: [every[i] for i in own][:limit] for split, own in parts.items()}
    else:
        found = {s: batches(Subset(whole, own), size, limit, f"{name}, {s},") for s, own in parts.items()}
    return found, f"{name} knows no splits, so every fifth {what} is held out."


def batches(made: Any, size: int, limit: int | None, name: str) -> list[Any]:
    """At most `limit` batches of what a user's function returned.

    Raises:
        DataError: it is nothing that has batches, has none, or fails.
    """
    whole = _samples(made)
    if isinstance(made, IterableDataset):
        made = DataLoader(made, batch_size=size)
    elif whole is not None:
        made = DataLoader(whole, batch_size=size)
    elif not isinstance(made, Iterable) or isinstance(made, str | bytes | Mapping | Tensor | np.ndarray):
        raise DataError(
            f"{name} is of type {type(made).__name__}; give a Dataset, a DataLoader, arrays of equal length, an"
            " iterable of batches, or a mapping of those with 'train' and 'heldout'."
        )
    try:
        found = list(islice(iter(made), MOST + 1 if limit is None else limit))
    except Exception as error:
        raise DataError(f"{name} can't be read: {type(error).__name__}: {first_line(error)}") from error
    if not found:
        raise DataError(f"{name} has no batch.")
    if limit is None and len(found) > MOST and not hasattr(made, "__len__"):
        raise DataError(f"{name} goes on after {MOST:,} batches; give data.limit=NUMBER if it has no end.")
    return found


def _samples(made: Any) -> Dataset[Any] | None:
    """As samples by their number; None for what brings batches."""
    arrays = made if isinstance(made, tuple) else (made,)
    if all(isinstance(one, Tensor | np.ndarray) and one.ndim for one in arrays) and arrays:
        if len({len(one) for one in arrays}) > 1:
            raise DataError(
                f"The arrays have {', '.join(str(len(one)) for one in arrays)} samples; give equal numbers."
            )
        tensors = tuple(torch.as_tensor(one) for one in arrays)
        return TensorDataset(*tensors) if isinstance(made, tuple) else _Single(tensors[0])
    if isinstance(made, tuple) and any(isinstance(one, Tensor | np.ndarray) for one in made):
        odd = [type(one).__name__ for one in made if not isinstance(one, Tensor | np.ndarray)]
        if odd:
            raise DataError(
                f"The data's tuple has an entry of type {odd[0]} beside arrays; give arrays of equal length, or a"
                " Dataset."
            )
    if isinstance(made, DataLoader | IterableDataset | Mapping | str | bytes | tuple):
        return None
    if isinstance(made, list) and made and _is_batch(made[0]):
        return None
    numbered: Any = made if hasattr(made, "__getitem__") and hasattr(made, "__len__") else None
    return numbered


def _is_batch(element: Any) -> bool:
    """Whether an element of a list is a batch: arrays alone, with as many rows each."""
    leaves = pytree.tree_leaves(element)
    return (
        bool(leaves)
        and all(isinstance(t, Tensor | np.ndarray) and t.ndim for t in leaves)
        and (len({len(leaf) for leaf in leaves}) == 1)
    )


class _Single(Dataset[Tensor]):
    """A tensor's rows, without the tuple that a TensorDataset makes of each."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: int) -> Tensor:
        return self.tensor[index]


def _takes(function: Callable[..., Any]) -> Sequence[str]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _called(function: Callable[..., Any], options: Mapping[str, Any], name: str) -> Any:
    if not callable(function):
        return function
    try:
        return function(**options)
    except (ConfigError, DataError):
        raise
    except Exception as error:
        raise DataError(f"{name} fails: {type(error).__name__}: {first_line(error)}") from error

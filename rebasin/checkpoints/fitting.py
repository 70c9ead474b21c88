"""Whether a file has what the module that it is taken for has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..types import State, dtype_of, shape_of


def require_whole(
    module: nn.Module, state: State, what: str, title: str, where: object, source: Callable[[str], str]
) -> None:
    """All tensors of `module`, in its shapes, among those of `state`; tied ones once. Nothing is read.

    Args:
        what: the component, for a sentence; `title` is what it is of, `where` its file.
        source: from the name of a tensor here to that in the file.

    Raises:
        CheckpointError: names the first that is missing, or has another shape, or holds no floating point numbers.
    """
    whole: dict[str, Any] = {n: t for n, t in module.state_dict(keep_vars=True).items() if torch.is_tensor(t)}
    whole = {name: t for name, t in whole.items() if t.is_floating_point() or name in state}  # not counts
    known = {id(tensor) for name, tensor in whole.items() if name in state}
    missing = []
    for name, tensor in whole.items():
        if name not in state:
            missing += [name] if id(tensor) not in known else []  # not those that are tied to another
        elif tensor.is_floating_point() and not dtype_of(state, name).is_floating_point:
            raise CheckpointError(
                f"Tensor {source(name)!r} of {where} has type"
                f" {str(dtype_of(state, name)).removeprefix('torch.')}, but weights are floating point numbers."
            )
        elif shape_of(state, name) != tuple(tensor.shape):
            raise CheckpointError(
                f"Tensor {source(name)!r} of {where} has shape {shape_of(state, name)}, but"
                f" {title} has {tuple(tensor.shape)} there."
            )
    if missing:
        raise CheckpointError(
            f"{where} is incomplete: its {what} lacks {missing[0]!r}"
            + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
            + f" of {title}."
        )

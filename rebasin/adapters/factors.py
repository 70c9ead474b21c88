"""How a change of a weight's rows and columns acts on the factors that an adapter keeps instead of the weight.

With `W[out, in, *kernel]` permuted to `W[rows][:, columns]`, the adapter's difference D must become
`D[rows][:, columns]`:

    LoRA, LoCon   D = up (mid) down           up by rows, down by columns, mid as it is
    LoHa          D = (a1 b1) * (a2 b2)       a1, a2 by rows, b1, b2 by columns: an elementwise product follows
    LoKr          D = kron(w1, w2)            see lokr.py
    full, norm    D                           by rows and columns
    IA3           D = W diag(v), diag(v) W    v by columns, or by rows
    DoRA          norms of W + D              by rows (or by columns, where they are norms of columns)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import AdapterError
from ..types import State


@dataclass(frozen=True)
class Moves:
    """Where the rows (outputs) and columns (inputs) of a weight go: int64 [out] and [in], None if they stay."""

    shape: tuple[int, ...]
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None

    def __bool__(self) -> bool:
        return self.rows is not None or self.columns is not None


def move_factor(module: str, factor: str, tensor: Tensor, moves: Moves, state: State) -> Tensor:
    kernel = math.prod(moves.shape[2:])
    if factor in ("constant", "mid", "on_input", "hada_t1", "hada_t2", "embedding_down") or tensor.ndim == 0:
        return tensor
    if factor in ("up", "diff_b", "w_norm", "b_norm", "bias"):
        return take(module, factor, tensor, 0, moves.rows, moves.shape[0])
    if factor == "down":
        return take(module, factor, tensor, 1, moves.columns, moves.shape[1])
    if factor == "embedding_up":  # an embedding's neurons are the columns of its table
        return take(module, factor, tensor, 0, moves.columns, moves.shape[1])
    if factor == "diff":
        tensor = take(module, factor, tensor, 0, moves.rows, moves.shape[0])
        return take(module, factor, tensor, 1, moves.columns, moves.shape[1]) if tensor.ndim > 1 else tensor
    if factor in ("hada_w1_a", "hada_w2_a"):
        # Beside a core tensor the factors are stored [rank, out] and [rank, in].
        core = factor.replace("_w", "_t").removesuffix("_a") in state
        return take(module, factor, tensor, 1 if core else 0, moves.rows, moves.shape[0])
    if factor in ("hada_w1_b", "hada_w2_b"):
        return take(module, factor, tensor, 1, moves.columns, moves.shape[1], kernel)
    if factor == "magnitude":
        axis = next((a for a, size in enumerate(tensor.shape) if size == moves.shape[0]), 0)
        return take(module, factor, tensor, axis, moves.rows, moves.shape[0])
    if factor == "dora_scale":
        if tensor.shape[0] == moves.shape[0] and (tensor.ndim == 1 or tensor.shape[1] == 1):
            return take(module, factor, tensor, 0, moves.rows, moves.shape[0])
        if tensor.ndim > 1 and tensor.shape[1] == moves.shape[1]:
            return take(module, factor, tensor, 1, moves.columns, moves.shape[1])
        return take(module, factor, tensor, 1 if tensor.ndim > 1 else 0, moves.rows, moves.shape[0])
    if factor == "ia3":
        on_input = bool(state["on_input"].item()) if "on_input" in state else tensor.numel() != moves.shape[0]
        index, size = (moves.columns, moves.shape[1]) if on_input else (moves.rows, moves.shape[0])
        axis = next((a for a, length in enumerate(tensor.shape) if length == size), 0)
        return take(module, factor, tensor, axis, index, size)
    raise AdapterError(f"The adapter's module {module!r} has a factor {factor!r} that is not known here.")


def take(
    module: str, factor: str, tensor: Tensor, axis: int, index: np.ndarray | None, size: int, kernel: int = 1
) -> Tensor:
    """`tensor` with `axis` permuted; it may have each neuron's `kernel` values side by side there."""
    length = tensor.shape[axis] if axis < tensor.ndim else 0
    if length not in (size, size * kernel):
        raise AdapterError(
            f"The adapter's {factor!r} of {module!r} has shape {tuple(tensor.shape)}, but the model has {size}"
            f" neurons there: it was trained on another architecture."
        )
    if index is None:
        return tensor
    if length != size:
        index = (index[:, None] * kernel + np.arange(kernel)).reshape(-1)
    return tensor.index_select(axis, torch.from_numpy(index).to(tensor.device)).contiguous()

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
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import AdapterError, shown
from ..types import State


@dataclass(frozen=True)
class Moves:
    """Where the rows (outputs) and columns (inputs) of a weight go: int64 [out] and [in], None if they stay."""

    shape: tuple[int, ...]
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None


ROWS, COLUMNS = 0, 1

ACTS: dict[str, tuple[tuple[int, int], ...]] = {
    **dict.fromkeys(("constant", "mid", "on_input", "embedding_down"), ()),
    **dict.fromkeys(("hada_t1", "hada_t2", "lokr_t1", "lokr_t2"), ()),
    **dict.fromkeys(("up", "diff_b", "w_norm", "b_norm", "bias", "lokr_w1_a"), ((0, ROWS),)),
    **dict.fromkeys(("down", "hada_w1_b", "hada_w2_b", "lokr_w1_b", "lokr_w2_b"), ((1, COLUMNS),)),
    **dict.fromkeys(("diff", "lokr_w1", "lokr_w2"), ((0, ROWS), (1, COLUMNS))),
    "embedding_up": ((0, COLUMNS),),  # an embedding's neurons are the columns of its table
}
"""Factor -> its axes that follow, each with the axis of the weight that it follows."""

FLAT = ("hada_w1_b", "hada_w2_b", "lokr_w2", "lokr_w2_b")
"""Factors that may have the values of a convolution's kernel side by side."""


def move_factor(module: str, factor: str, tensor: Tensor, moves: Moves, state: State) -> Tensor:
    """One factor of a module's `state` after its weight moved.

    Raises:
        AdapterError: it is not known, or has another shape than the weight needs.
    """
    kernel = math.prod(moves.shape[2:]) if factor in FLAT else 1
    for axis, side in _acts(module, factor, tensor, moves.shape, state) if tensor.ndim else ():
        index = (moves.rows, moves.columns)[side]
        tensor = take(module, factor, tensor, axis, index, moves.shape[side], kernel)
    return tensor


def _acts(
    module: str, factor: str, tensor: Tensor, weight: tuple[int, ...], state: State
) -> Sequence[tuple[int, int]]:
    """The factor's entry in ACTS, or what takes its place where that depends on shapes or other factors."""
    shape = tuple(tensor.shape)
    if factor in ACTS:
        return ACTS[factor][: tensor.ndim]
    if factor in ("hada_w1_a", "hada_w2_a", "lokr_w2_a"):
        # Beside a core tensor the factors are stored [rank, out] and [rank, in].
        return [(int(factor.replace("_w", "_t").removesuffix("_a") in state), ROWS)]
    if factor == "dora_scale":
        if shape[0] == weight[0] and shape[1:2] in ((), (1,)):
            return [(0, ROWS)]
        return [(1, COLUMNS)] if shape[1:2] == weight[1:2] else [(min(1, len(shape) - 1), ROWS)]
    if factor == "magnitude":
        side = ROWS
    elif factor == "ia3":
        side = COLUMNS if bool(state["on_input"].item()) else ROWS
    else:
        raise AdapterError(
            f"The adapter's module {shown(module)} has a factor {factor!r} that is not known here."
        )
    return [(shape.index(weight[side]) if weight[side] in shape else 0, side)]


def take(
    module: str, factor: str, tensor: Tensor, axis: int, index: np.ndarray | None, size: int, kernel: int = 1
) -> Tensor:
    """`tensor` with `axis` permuted; it may have each neuron's `kernel` values side by side there."""
    length = tensor.shape[axis] if axis < tensor.ndim else 0
    if length not in (size, size * kernel):
        raise AdapterError(
            f"The adapter's {factor!r} of {shown(module)} has shape {tuple(tensor.shape)}, but the model has {size}"
            f" neurons there: it was trained on another architecture."
        )
    if index is None:
        return tensor
    if length != size:
        index = (index[:, None] * kernel + np.arange(kernel)).reshape(-1)
    return tensor.index_select(axis, torch.from_numpy(index).to(tensor.device)).contiguous()

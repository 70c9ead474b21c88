"""LoKr: a difference that is a Kronecker product, which few permutations leave one.

    D[l K + k, m N + n, q] = w1[l, m] w2[k, n, q]

follows a permutation of rows that reorders the L blocks and, in all of them alike, the K rows inside; so for
columns. Every other one has to be written out, as a LoRA of the product's exact rank or as a full difference.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..errors import AdapterError, shown
from ..types import State
from .factors import Moves, move_factor


def move_lokr(module: str, state: State, moves: Moves, unfold: bool = False) -> dict[str, Tensor]:
    """The factors of one LoKr module (factor -> tensor) after its weight moved.

    Raises:
        AdapterError: the factors don't fit the weight; or the product would have to be written out, but `unfold`
            is not set; or that can't be done, because a DoRA norm needs low-rank factors beside it.
    """
    w1 = _small(state)
    outs, ins = w1.shape
    if moves.shape[0] % outs or moves.shape[1] % ins:
        raise AdapterError(
            f"The Kronecker factors of {shown(module)} do not divide the model's {moves.shape[0]} x {moves.shape[1]}"
            " neurons: the adapter was trained on another architecture."
        )
    rows, columns = _product(moves.rows, moves.shape[0], outs), _product(moves.columns, moves.shape[1], ins)
    if rows is not None and columns is not None:
        inner = (moves.shape[0] // outs, moves.shape[1] // ins, *moves.shape[2:])
        parts = {
            "lokr_w1": Moves((outs, ins), rows[0], columns[0]),
            "lokr_w2": Moves(inner, rows[1], columns[1]),
        }
        return {f: move_factor(module, f, t, parts.get(f[:7], moves), state) for f, t in state.items()}
    if not unfold:
        raise AdapterError(
            f"The LoKr factors of {shown(module)} can't carry this permutation, which does not respect their"
            " Kronecker structure; convert such modules with --unfold (in Python, unfold=True)."
        )
    others = {name: t for name, t in state.items() if not name.startswith("lokr") and name != "constant"}
    plain = unfolded(module, state, moves.shape) | others
    return {name: move_factor(module, name, tensor, moves, plain) for name, tensor in plain.items()}


def unfolded(module: str, state: State, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The module as LoRA of the rank that kron(w1, a b) has, or as a full difference where that is no larger.

    kron(w1, a b) = kron(w1, a) kron(1, b) = kron(1, a) kron(w1, b): its rank is the smaller side of w1 times that
    of a b, so nothing is lost but rounding to the factors' type.
    """
    w1, (out, inp, *kernel) = _small(state), shape
    scale = _scale(state)
    dtype = next(t.dtype for name, t in state.items() if name.startswith("lokr"))
    needs_factors = "dora_scale" in state
    if "lokr_w2_a" in state and "lokr_t2" not in state:
        a, b = state["lokr_w2_a"].double(), state["lokr_w2_b"].double()
        b = b.reshape(b.shape[0], inp // w1.shape[1], -1)
        rank = min(w1.shape) * a.shape[1]
        pixels = math.prod(kernel)
        if needs_factors or rank * (out + inp * pixels) < out * inp * pixels:
            one = torch.eye(min(w1.shape), dtype=w1.dtype)
            left, right = (w1, one) if w1.shape[1] <= w1.shape[0] else (one, w1)
            up = torch.kron(left, a) * scale
            down = torch.einsum("pm,rnq->prmnq", right, b)
            return {
                "down": down.reshape(rank, inp, *kernel).to(dtype),
                "up": up.reshape(out, rank, *(1 for _ in kernel)).to(dtype),
                "constant": torch.tensor(float(rank), dtype=dtype),
            }
    if needs_factors:
        raise AdapterError(f"The LoKr factors of {shown(module)} can't be unfolded beside their DoRA norm.")
    w1 = w1.reshape(*w1.shape, *(1 for _ in kernel))
    w2 = _large(state, (out // w1.shape[0], inp // w1.shape[1], *kernel))
    return {"diff": (torch.kron(w1, w2.contiguous()) * scale).to(dtype)}


def _product(index: np.ndarray | None, size: int, blocks: int) -> tuple[np.ndarray, np.ndarray] | None:
    """`index` as (order of `blocks` blocks, common order inside them), or None if it is no such product."""
    inner = size // blocks
    if index is None:
        return np.arange(blocks), np.arange(inner)
    table = index.reshape(blocks, inner)
    order, inside = table[:, 0] // inner, table[0] % inner
    return (order, inside) if np.array_equal(table, order[:, None] * inner + inside) else None


def _small(state: State) -> Tensor:
    """w1, float64 [L, M]."""
    if "lokr_w1" in state:
        return state["lokr_w1"].double()
    return state["lokr_w1_a"].double() @ state["lokr_w1_b"].double()


def _large(state: State, shape: tuple[int, ...]) -> Tensor:
    """w2, float64 [K, N, *kernel]."""
    if "lokr_w2" in state:
        return state["lokr_w2"].double().reshape(shape)
    a, b = state["lokr_w2_a"].double(), state["lokr_w2_b"].double()
    if "lokr_t2" in state:
        return torch.einsum("ij...,ip,jr->pr...", state["lokr_t2"].double(), a, b).reshape(shape)
    return (a @ b.reshape(b.shape[0], -1)).reshape(shape)


def _scale(state: State) -> float:
    """What kron(w1, w2) is multiplied by: alpha / rank, or 1 if neither factor is decomposed."""
    ranks = [state[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in state]
    return float(state["constant"]) / ranks[0] if ranks and "constant" in state else 1.0

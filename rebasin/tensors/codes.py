"""Weights that a file holds as codes and scales (fp8 "scaled", int8): seen as the numbers that they stand for.

ComfyUI's files have `X.scale_weight` or `X.weight_scale` beside `X.weight`, a number or one for each row, and marks;
the weight is their product. Averaging codes would be noise, so what is not understood is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import CheckpointError, shown
from ..types import DerivedState, LazyTensor, State, dtype_of, origin_of, passed, shape_of

TYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)

MARKS = r"(?:^|[./])(?:scaled_fp8|comfy_quant|scale_input|input_scale|scale_output|output_scale)$"
"""What tells a loader to compute in 8 bits, and is of no use to the numbers."""

REFUSED = (
    r"(?:^|\.)(?:qweight|qzeros|g_idx|SCB|(?:nested_)?absmax|(?:nested_)?quant_map|weight_packed|weight_scale_2"
    r"|\w*scale_inv|(?:\w+_)?zero_points?|_packed_params|quant_state\b.*|_data|_scale)$"
)
"""What GPTQ, AWQ, bitsandbytes, quanto, torch and others leave beside their codes."""


class DecodedState(DerivedState):
    """A state of numbers; `codes` are the names of those that the file has as codes."""

    codes: frozenset[str] = frozenset()


def decoded(state: State, where: object) -> State:
    """`state` with its codes multiplied by their scales when they are read, in float32; itself if it has none.

    Raises:
        CheckpointError: there are codes of another kind; names the tensor and the file, `where`.
    """
    foreign = next((name for name in state if re.search(REFUSED, name)), None)
    if foreign is not None:
        raise CheckpointError(
            f"{where} is quantised in a way that is not known here (it has {shown(foreign)}); take the file that it"
            " was made from."
        )
    scales = dict(_scales(state))
    marks = {name for name in state if re.search(MARKS, name)}
    if not scales and not marks:
        return state

    def lazy(name: str, scale: str) -> LazyTensor:
        shape, by = shape_of(state, name), _fitted(shape_of(state, scale), shape_of(state, name))
        if by is None or not dtype_of(state, scale).is_floating_point:
            raise CheckpointError(
                f"The scale {shown(scale)} of {where} has shape {shape_of(state, scale)}, which does not fit its"
                f" weight's {shape} by rows; take the file that this one was made from."
            )

        def make() -> Tensor:
            return state[name].to(torch.float32) * state[scale].to(torch.float32).reshape(by)

        return LazyTensor(shape, torch.float32, make, origin_of(state, name))

    kept = [name for name in state if name not in marks and name not in scales.values()]
    made = DecodedState({n: lazy(n, scales[n]) if n in scales else passed(state, n) for n in kept})
    made.codes = frozenset(scales)
    return made


def _scales(state: State, floats: bool = True) -> Iterator[tuple[str, str]]:
    """Each weight that has a scale, and the scale; `floats`: of a checkpoint, whose codes someone may have widened."""
    names = set(state)  # `in` may read the tensor of a mapping of the user's own
    for name in state if any(one.endswith(("scale", "scale_weight")) for one in names) else ():
        codes, base = dtype_of(state, name) in TYPES, name.removesuffix("weight")
        if codes or (floats and base != name):
            own = [
                f"{base}scale_weight",
                f"{name}_scale",
                *([f"{base}scale", f"{name}.scale"] if codes else ()),
            ]
            if found := next((scale for scale in own if scale in names), None):
                yield name, found


def _fitted(scale: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape in which a scale is multiplied with a weight: one number, or one for each row; None for all others."""
    size = torch.Size(scale).numel()
    ones = (1,) * (len(weight) - 1)
    if size == 1:
        return (1,) * len(weight)
    return (size, *ones) if weight and size == weight[0] == scale[0] else None


def require_numbers(state: State, where: object) -> None:
    """Raise `CheckpointError` if a state has codes with scales, which must not be averaged as they are."""
    if found := next(_scales(state, floats=False), None):
        raise CheckpointError(
            f"Tensor {shown(found[0])} of {where} is stored as codes with the scale {shown(found[1])}: multiply them"
            " first (rebasin.checkpoints.open_checkpoint does)."
        )

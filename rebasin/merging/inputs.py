"""What the inputs of a merge must be, and reading shapes and dtypes without reading tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..tensors.quantised import require_numbers
from ..types import State, common_dtype, dtype_of, is_finite, is_number, require_state, shape_of, wrapped


def check_finite(place: str, tensor: Tensor, first: torch.dtype) -> None:
    """Every value must be a number; `place` is where the tensor stands (see `types.place_of`).

    Raises:
        CheckpointError: it has NaN or infinity, or it is an integer tensor where the first model's is not.
    """
    if not is_number(tensor.dtype):
        raise CheckpointError(f"Tensor {place} is {tensor.dtype}, but {first} in the first model.")
    if not is_finite(tensor):
        wrong = "NaN" if bool(tensor.isnan().any()) else "infinity"
        raise CheckpointError(
            f"Tensor {place} has a value that is {wrong}: the file is damaged or its training diverged."
        )


def same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit: two tensors with the same NaN (a mask, say) are the same, too."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.numel() == 0:
        return True
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other.to(one.device))]
    return torch.equal(*bits)


def is_copy(one: State, other: State) -> bool:
    """Whether two states hold the same numbers, whatever their types; reads no further than the first difference."""
    if one is other:
        return True
    if set(one) != set(other):
        return False
    for name in one:
        if shape_of(one, name) != shape_of(other, name):
            return False
    return all(_same_numbers(one[name], other[name]) for name in one)


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    if one.dtype == other.dtype or not (is_number(one.dtype) and is_number(other.dtype)):
        return same(one, other)
    wide = common_dtype(one.dtype, other.dtype)
    return same(one.to(wide), other.to(wide))


def copies(states: Sequence[State], labels: Sequence[str], base: State | None = None) -> list[str]:
    """A sentence about each state that is a copy of an earlier one, and about a base that is one of them but the first
    (the first may be: that is task arithmetic).
    """
    told = []
    for i in range(1, len(states)):
        twin = next((j for j in range(i) if is_copy(states[j], states[i])), None)
        if twin is not None:
            told.append(
                f"{labels[twin]} and {labels[i]} are the same model, so merging the two changes nothing."
            )
    if base is not None:
        for label, state in zip(labels[1:], states[1:], strict=False):
            if is_copy(state, base):
                told.append(f"The base and {label} are the same model, which therefore adds nothing.")
    return told


def check_names(one: State, other: State, label: str = "A", other_label: str = "B") -> None:
    """The same names, and the same shapes where these are known without reading a tensor.

    Raises:
        CheckpointError: names the tensor.
    """
    require_state(one, label)
    require_state(other, other_label)
    for has, lacks, mine, theirs in ((label, other_label, one, other), (other_label, label, other, one)):
        names = set(theirs)  # `in` would read the tensor of a lazy mapping
        missing = [name for name in mine if name not in names]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"Tensor '{missing[0]}'{more} is in {has} but not in {lacks}: all must have the same"
                f" architecture{wrapped(theirs)}."
            )
    for state, what in ((one, label), (other, other_label)):
        require_numbers(state, what)
    if all(isinstance(state, dict) or hasattr(state, "shape_of") for state in (one, other)):
        for name in one:
            if shape_of(one, name) != shape_of(other, name):
                raise wrong_shape(name, label, shape_of(one, name), other_label, shape_of(other, name))


def with_ties(states: Sequence[State]) -> list[State]:
    """The states, each with the names that it lacks because they are another's for a tensor that it has.

    What tied weights are called is known of plain tensors alone: they have their memory in common.
    """
    done = list(states)
    for i, state in enumerate(done):
        for other in done:
            if isinstance(state, dict) and isinstance(other, dict) and other.keys() - state.keys():
                here = {_memory(tensor): name for name, tensor in other.items() if name in state}
                lost = {name: here.get(_memory(t)) for name, t in other.items() if name not in state}
                state = {**state, **{name: state[own] for name, own in lost.items() if own is not None}}
        done[i] = state
    return done


def _memory(tensor: object) -> object:
    if (
        not isinstance(tensor, Tensor)
        or tensor.layout != torch.strided
        or tensor.is_meta
        or not tensor.numel()
    ):
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def check_companion(state: State, companion: State, label: str) -> None:
    require_state(companion, f"the companion of {label}")
    names = set(companion)
    missing = [name for name in state if name not in names and is_number(dtype_of(state, name))]
    if missing:
        raise CheckpointError(
            f"Tensor '{missing[0]}' is in {label} but not in its companion: compute it for the whole."
        )
    for name in state:
        if name in names and (shape := shape_of(state, name)) != (other := shape_of(companion, name)):
            raise wrong_shape(name, label, shape, f"the companion of {label}", other)


def wrong_shape(
    name: str, label: str, shape: tuple[int, ...], other_label: str, other: tuple[int, ...]
) -> CheckpointError:
    return CheckpointError(
        f"Tensor '{name}' has shape {shape} in {label} and {other} in {other_label}:"
        " all must have the same architecture."
    )


def integers_differ(name: str, label: str, other_label: str) -> CheckpointError:
    return CheckpointError(
        f"Integer tensor '{name}' differs between {label} and {other_label}: integers can't be merged, so make them"
        " equal or leave the tensor out."
    )

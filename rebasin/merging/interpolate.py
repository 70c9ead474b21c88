"""The straight line between two states: (1 - lambda) A + lambda B, tensor by tensor.

Nothing here knows about models or files. A state is any mapping from names to tensors; a lazy one (that reads
a tensor from its file when asked) is read one tensor at a time, so the peak memory is the result plus two
tensors.
"""

import math

import torch
from torch import Tensor

from ..arguments import typed
from ..errors import CheckpointError, ConfigError
from ..types import State, common_dtype, is_number
from .inputs import check_names, integers_differ, with_ties, wrong_shape

# Counters, not weights: BatchNorm's number of batches seen. Two trainings may differ in them without harm.
COUNTERS = ("num_batches_tracked",)


@typed
def interpolate(state_a: State, state_b: State, lam: float) -> dict[str, Tensor]:
    """Return the state at `lam` on the line from A (`lam` = 0) to B (`lam` = 1).

    Floating (and complex) tensors, BatchNorm's running statistics among them, are combined in at least
    float32 and stored in A's dtype on A's device. Integer and boolean tensors must be equal in A and B and
    are copied, except BatchNorm's `num_batches_tracked`, which follows A (at `lam` = 1 it is B's). At `lam` 0
    and 1 the result is A or B bit for bit (B in A's dtype, should the two differ). `lam` outside [0, 1]
    extrapolates.

    The result holds new tensors that share no memory with A or B.

    Raises:
        CheckpointError: the two states differ in their names, shapes or integer tensors; names the tensor.
        ConfigError: `lam` is not a finite number.
    """
    state_a, state_b = with_ties([state_a, state_b])
    check_names(state_a, state_b)
    return {name: interpolate_tensor(name, state_a[name], state_b[name], lam) for name in state_a}


def interpolate_tensor(name: str, a: Tensor, b: Tensor, lam: float) -> Tensor:
    """`interpolate` for one tensor; `name` is used in errors and to tell counters from weights."""
    if not math.isfinite(lam):
        raise ConfigError(f"lambda is {lam}, but it must be a finite number, usually between 0 and 1.")
    if a.shape != b.shape:
        raise wrong_shape(name, "A", tuple(a.shape), "B", tuple(b.shape))
    a, b = a.detach(), b.detach()
    if is_number(a.dtype) != is_number(b.dtype) or a.is_complex() != b.is_complex():
        raise CheckpointError(
            f"Tensor '{name}' is {a.dtype} in A and {b.dtype} in B: these cannot be interpolated."
        )
    if lam == 0:
        return a.clone()
    if not is_number(a.dtype):
        return _whole(name, a, b.to(a.device), lam)
    if lam == 1:
        return b.to(device=a.device, dtype=a.dtype, copy=True)
    wide = common_dtype(a.dtype, b.dtype)
    # lerp is (1 - lam) A + lam B, written such that equal tensors (frozen parts, say) stay equal to the bit.
    return torch.lerp(a.to(wide), b.to(device=a.device, dtype=wide), lam).to(a.dtype)


def _whole(name: str, a: Tensor, b: Tensor, lam: float) -> Tensor:
    if name.rsplit(".", 1)[-1] in COUNTERS:
        return (b if lam == 1 else a).clone()
    if not torch.equal(a, b.to(a.dtype)):
        raise integers_differ(name, "A", "B")
    return a.clone()

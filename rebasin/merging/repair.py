"""REPAIR: give a merged network's neurons back the variance that averaging took from them.

Jordan, Sedghi, Saukh, Entezari and Neyshabur, "REPAIR: REnormalizing Permuted Activations for Interpolation Repair"
(2022). Neurons of aligned networks agree only in part, so that their mean varies less than each of them, and from
layer to layer ever less. `repair` rescales every hidden neuron of the merge until, over the data,

    its mean is  sum_j w_j mean_j,  and its standard deviation is  sum_j w_j std_j,

those of the same neuron in the members: linear in the standard deviation, not in the variance. Members must be given
as they went into the mean, that is permuted: those of the original networks belong to other neurons.

What differs from the authors' code: no BatchNorm is inserted and fused again. Layers are corrected one after the
other, in the order in which they run, each with its statistics over the whole data and with all before it corrected.
So a merge of identical networks stays as it is, to the bit, and there is nothing left to fuse.

For networks with BatchNorm `reset_statistics` is the remedy: running statistics that were averaged are those of no
network, and are collected anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..arguments import typed
from ..errors import ConfigError, DataError
from ..spec import PermutationSpec
from ..tensors.modules import Forward, call_model, computing, eval_mode, to_device
from ..types import State, is_finite
from .least_squares import repair_least_squares, solvable
from .methods.linear import average
from .neuron_moments import (
    Repaired,
    Rescaling,
    batch_norms,
    hidden_sites,
    measure,
    member_weights,
    replaced,
    working_copy,
)
from .repair_closed_form import repair_closed_form
from .zipit import repair_zipit, zippable

How = Literal["reset", "rescale", "closed_form", "least_squares", "zipit"]
REPAIRS: tuple[How, ...] = get_args(How)
"""What can be done to a merge, from the mildest: statistics of BatchNorm, REPAIR, REPAIR in closed form; and what makes
another network of the members: new layers by least squares, or neurons that are pairs of theirs.
"""


@typed
def reset_statistics(
    model: nn.Module,
    state: State,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """`state` with the running statistics of all its BatchNorms collected anew: averages over all batches.

    Batches count by their numbers, and should be large; one with a single number for each channel has no variance and
    is left out. The other layers run as in evaluation. Without BatchNorm the state is returned as it is. `model` is
    left as it was.

    Args:
        model: the architecture. Its weights do not matter.
        batches: of training data, with its usual augmentation.
        forward: calls the model on a batch, `forward(model, batch)`. Without it a tensor, or (tensor, labels), is
            the model's input, a tuple its arguments, a mapping its keyword arguments.
        device: where to compute; default: where `model` is.

    Raises:
        DataError: there are no batches, or the statistics are not finite.
    """
    work, where = working_copy(model, state, device)
    norms = batch_norms(work)
    if not norms:
        return dict(state)
    seen = 0
    with torch.no_grad(), eval_mode(work):
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches, where a norm is not called as a module
            norm.train()
        counts = {name: _Counted() for name in norms}
        for name, norm in norms.items():
            norm.register_forward_pre_hook(counts[name], with_kwargs=True)  # of a copy
        for batch in batches:
            with computing(batch):
                (forward or call_model)(work, to_device(batch, where))
            seen += 1
    if not seen:
        raise DataError("There are no batches to collect the statistics of BatchNorm from.")
    if alone := [name for name, count in counts.items() if count.calls and not count.numbers]:
        raise DataError(
            f"No batch gives {alone[0]!r} two numbers for each channel, so it has no variance; use larger batches."
        )
    ran = {name for name, norm in norms.items() if counts[name].calls or not _untouched(norm)}
    if not ran:
        raise DataError("No BatchNorm of the model runs on these batches, so there is nothing to collect.")
    fresh = {
        f"{name}.{kind}": buffer
        for name, norm in norms.items()
        if name in ran  # others lie in parts that are not used
        for kind, buffer in norm.named_buffers()
    }
    for name, buffer in fresh.items():
        if not is_finite(buffer):
            raise DataError(
                f"The statistics {name!r} are not finite on these batches, so they can't be reset."
            )
    return replaced(state, fresh)


def _untouched(norm: _BatchNorm) -> bool:
    """Whether its statistics are those of a reset."""
    assert norm.running_mean is not None and norm.running_var is not None
    return not bool(norm.running_mean.any()) and bool((norm.running_var == 1).all())


@dataclass
class _Counted:
    """Before a BatchNorm's forward pass: its running statistics become the mean over all batches so far, each by how
    many numbers it has for a channel.
    """

    calls: int = 0
    numbers: int = 0

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
        assert isinstance(norm, _BatchNorm)
        x = inputs[0] if inputs else named["input"]
        count = x.numel() // x.shape[1]
        self.calls += 1
        norm.train(count > 1)
        if count > 1:
            self.numbers += count
            norm.momentum = count / self.numbers


def unfit(spec: PermutationSpec, model: nn.Module, how: How) -> str | None:
    """Why a network has nothing that this repair changes; None if it has."""
    if how == "least_squares":
        return (
            None
            if solvable(model)[0]
            else "it has no linear layer and no convolution with a weight of its own"
        )
    if how == "zipit":
        found = zippable(spec, model)[0]
        return None if found else "all its neurons lie in heads, blocks or modules that are not torch's own"
    if batch_norms(model):
        return None
    if how == "reset":
        return "it has no BatchNorm whose statistics could be collected anew"
    if not hidden_sites(spec, model)[0]:
        return "no layer or norm whose neurons can move has both a weight and a bias of its own"
    return None


@typed
def repair(
    spec: PermutationSpec,
    model: nn.Module,
    merged: State,
    members: Sequence[State],
    batches: Iterable[Any],
    *,
    how: How = "rescale",
    weights: Sequence[float] | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
) -> Repaired:
    """Give a merge's neurons back what averaging took from them; nothing is changed in place.

    "reset" collects the statistics of BatchNorm anew, in one pass over the data; weights stay as they are. "rescale",
    REPAIR, does that first, and then rescales and shifts the outputs of linear layers, convolutions and norms that have
    a weight and a bias and whose neurons the spec permutes, to the members' mean and standard deviation: one pass for
    each member, and one for each layer. "closed_form" approximates it without running the merge. "least_squares" solves
    for linear layers and convolutions anew (`repair_least_squares`, PLeaS), "zipit" pairs the neurons of two members,
    also inside one (`repair_zipit`); both then collect the statistics.

    Args:
        spec: the architecture's symmetries: they tell which neurons are hidden.
        model: the architecture. Its weights do not matter.
        merged: the mean of the members.
        members: the models as they went into it: permuted (`result.members(states)`).
        batches: of training data, gone through many times.
        how: what is done.
        weights: of the members in the mean, positive; by default all alike.
        forward, device: see `reset_statistics`.

    Raises:
        DataError: there are no batches, or an activation is not finite.
        ConfigError: the weights do not fit, there are no members, or the network has nothing that this changes.
    """
    began = perf_counter()
    raw = member_weights(members, weights)
    if (reason := unfit(spec, model, how)) is not None:
        raise ConfigError(
            f"This network can't be repaired by how={how!r}: {reason}; choose another way, or none."
        )
    if how == "closed_form":
        return repair_closed_form(
            spec, model, merged, members, batches, weights=weights, forward=forward, device=device
        )
    batches = list(batches)
    if how in ("least_squares", "zipit"):
        work = repair_least_squares if how == "least_squares" else repair_zipit
        made = work(spec, model, merged, members, batches, weights=weights, forward=forward, device=device)
        fresh = reset_statistics(model, made.state, batches, forward=forward, device=device)
        return replace(made, state=fresh, reset=bool(batch_norms(model)), seconds=perf_counter() - began)
    call = forward or call_model
    plain, where = working_copy(model, merged, device)
    has_norms = bool(batch_norms(plain))
    start = reset_statistics(model, merged, batches, forward=forward, device=device) if has_norms else merged
    if how == "reset":
        return Repaired(dict(start), {}, (), True, perf_counter() - began)
    work, _ = working_copy(model, start, where)
    sites, left_out = hidden_sites(spec, work)
    found = [
        measure(working_copy(model, m, where, "a member")[0], sites, batches, call, where) for m in members
    ]
    rescaling = Rescaling(work)
    for name in found[0]:  # in the order in which they run
        now = measure(work, {name: sites[name]}, batches, call, where)[name]
        goal_mean, goal_std = (average([one[name][k] for one in found], raw) for k in (0, 1))
        rescaling.apply(name, now, (goal_mean, goal_std))
    left = tuple(left_out) + tuple(name for name in sites if name not in rescaling.scales)
    return Repaired(
        replaced(start, rescaling.tensors), rescaling.scales, left, has_norms, perf_counter() - began
    )

"""Permute, then least squares: a merge whose layers answer as the mean of the aligned members does.

Nasery, Hayase, Koh and Oh, "PLeaS: Merging Models with Permutations and Least Squares" (CVPR 2025, arXiv 2407.02447).
With x_j what a layer of member j reads and y_j what it gives, of members that were aligned, the merge's weights are

    argmin_W  sum over the data  | W x - y |^2  +  r | W - W_mean |^2,    x = sum_j w_j x_j,  y = sum_j w_j y_j

layer by layer, biases included. This is no symmetry: **the merge computes something that neither member does**, so the
ends are no ends of its line, and what it is worth is what it scores. Members that are the same stay as they are.

What differs from the paper: neurons are matched all of them, so the merge has the members' width; r draws towards the
plain mean, so that what the data do not determine is that; BatchNorm's statistics are collected anew at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import NonNegative, typed
from ..errors import DataError
from ..spec import PermutationSpec
from ..tensors.modules import Forward, call_model, computing, eval_mode, hooked, to_device
from ..types import State, is_finite
from .neuron_moments import NO_SAMPLES, Repaired, member_weights, replaced, working_copy

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def solvable(model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    """Linear layers and convolutions with a weight of their own, by name; and those that are left as they are."""
    found: dict[str, nn.Module] = {}
    left: list[str] = []
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            continue
        plain = isinstance(module, nn.Linear) or (module.groups == 1 and module.padding_mode == "zeros")
        if plain and id(module.weight) not in owners:
            owners[id(module.weight)], found[name] = name, module
        else:
            left.append(name)
    return found, left


class _Moments:
    """X^T X and X^T Y of rows [samples, k] and answers [samples, neurons], float64; a last column of ones."""

    def __init__(self) -> None:
        self.own = self.cross = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1).double()
        self.own, self.cross = self.own + x.mT @ x, self.cross + x.mT @ y.double()

    def solve(self, mean: Tensor, ridge: float) -> Tensor:
        """The minimum [k + 1, neurons] near `mean`, with `ridge` relative to the mean square of an input."""
        r = ridge * self.own.diagonal().mean()
        one = torch.eye(len(self.own), dtype=torch.float64, device=self.own.device)
        return torch.linalg.solve(self.own + r * one, self.cross + r * mean)


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies with its weight, [samples and positions, weight.numel() / neurons]."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    assert isinstance(module, CONVOLUTIONS)
    d = len(module.kernel_size)
    sides = [module.padding] * d if isinstance(module.padding, str) else list(module.padding)
    if module.padding == "same":
        gaps = [g * (k - 1) for g, k in zip(module.dilation, module.kernel_size, strict=True)]
        pads = [(gap // 2, gap - gap // 2) for gap in gaps]
    else:
        pads = [(0, 0) if side == "valid" else (int(side), int(side)) for side in sides]
    x = nn.functional.pad(x, [side for pair in reversed(pads) for side in pair])
    sizes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (k, step, gap) in enumerate(sizes, 2):  # x: [samples, channels, places..., taps...]
        x = x.unfold(axis, gap * (k - 1) + 1, step)[..., ::gap]
    return x.movedim(1, 1 + d).reshape(-1, module.weight[0].numel())


def _answers(module: nn.Module, y: Tensor) -> Tensor:
    return (
        y.reshape(-1, y.shape[-1])
        if isinstance(module, nn.Linear)
        else y.movedim(1, -1).reshape(-1, y.shape[1])
    )


@typed
def repair_least_squares(
    spec: PermutationSpec,
    model: nn.Module,
    merged: State,
    members: Sequence[State],
    batches: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    ridge: NonNegative = 1e-3,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
) -> Repaired:
    """A merge whose linear layers and convolutions answer to the mean of the members' inputs with the mean of their
    outputs, as nearly as they can; nothing is changed in place.

    One pass over the data, in which all members run side by side. A layer with k inputs needs a matrix of k x k in
    float64 (3 x 3 convolutions of 512 channels: 170 MB each).

    Args:
        spec: the architecture's symmetries; the members were aligned by them.
        model: the architecture. Its weights do not matter.
        merged: the mean of the members, whose other tensors are kept.
        members: the models as they went into it: permuted.
        batches: of training data.
        weights: of the members in the mean, positive; by default all alike.
        ridge: how strongly layers are drawn towards the mean, relative to the mean square of their inputs.
        forward, device: see `reset_statistics`.

    Raises:
        DataError: there are no batches, or an activation is not finite.
        ConfigError: the weights do not fit, or there are no members.
    """
    began = perf_counter()
    raw = member_weights(members, weights)
    call = forward or call_model
    work, where = working_copy(model, merged, device)
    copies = [working_copy(model, member, where, "a member")[0] for member in members]
    layers, left = solvable(work)
    moments = {name: _Moments() for name in layers}
    seen = 0
    for batch in batches:
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        for share, copy in zip((w / fsum(raw) for w in raw), copies, strict=True):
            calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

            def hook(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
                x = args[0] if args else kwargs["input"]
                calls.setdefault(name, []).append((x.detach(), output.detach()))  # noqa: B023 (called at once)

            watched = {name: copy.get_submodule(name) for name in layers}
            with hooked(watched, hook), torch.no_grad(), eval_mode(copy), computing(batch):
                call(copy, to_device(batch, where))
            for name, made in calls.items():
                module = layers[name]
                x = torch.cat([_rows(module, one) for one, _ in made]) * share
                y = torch.cat([_answers(module, one) for _, one in made]) * share
                inputs[name] = inputs[name] + x if name in inputs else x
                outputs[name] = outputs[name] + y if name in outputs else y
        for name, x in inputs.items():
            moments[name].add(x, outputs[name])
            seen += len(x)
    if layers and not seen:
        raise DataError(NO_SAMPLES)
    tensors: dict[str, Tensor] = {}
    for name, module in layers.items():
        if moments[name].own.ndim == 0:
            left.append(name)  # it did not run
            continue
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        flat = weight.detach().reshape(len(weight), -1)
        last = torch.zeros(len(weight)).to(flat) if bias is None else bias.detach()  # type: ignore[union-attr]
        found = _without_bias(moments[name]) if bias is None else moments[name]
        mean = torch.cat([flat, last[:, None]], 1) if bias is not None else flat
        made = found.solve(mean.mT.double(), ridge).mT
        if not is_finite(made):
            raise DataError(
                f"The activations of {name!r} are not finite on these batches, so it can't be solved for."
            )
        tensors[f"{name}.weight"] = made[:, : flat.shape[1]].reshape(weight.shape)
        if bias is not None:
            tensors[f"{name}.bias"] = made[:, -1]
    return Repaired(replaced(merged, tensors), {}, tuple(left), False, perf_counter() - began)


def _without_bias(moments: _Moments) -> _Moments:
    own = _Moments()
    own.own, own.cross = moments.own[:-1, :-1], moments.cross[:-1]
    return own

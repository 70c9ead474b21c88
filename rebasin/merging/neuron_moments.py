"""What hidden neurons a network has, the moments of what they give, and layers rescaled by them.

`repair` and `repair_closed_form` are made of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError, DataError
from ..spec import PermutationSpec
from ..tensors.memory import duplicate
from ..tensors.modules import (
    Forward,
    computing,
    device_of,
    eval_mode,
    find_device,
    give_weights,
    hooked,
    to_device,
)
from ..types import State, brief, is_finite, require_state

CHANNELS_LAST = (nn.Linear, nn.LayerNorm)
CHANNELS_SECOND = (nn.Conv1d, nn.Conv2d, nn.Conv3d, _BatchNorm, nn.GroupNorm)
DEAD = 1e-6
"""A neuron that varies by less than this share of its layer's most lively one is shifted, but not scaled."""
NO_SAMPLES = "There are no batches to measure activations on, or all of them are empty."


@brief
@dataclass(frozen=True)
class Repaired:
    """A repaired merge.

    Attributes:
        state: name -> tensor, in the merge's own types.
        scales: module -> the mean factor by which its neurons were scaled, in the order of execution.
        left_out: modules with hidden neurons that can't be rescaled: they have no bias, share their weight with
            another, or are of a kind that is not known.
        reset: whether BatchNorm statistics were collected anew before.
        seconds: wall time.
    """

    state: dict[str, Tensor]
    scales: Mapping[str, float]
    left_out: tuple[str, ...]
    reset: bool
    seconds: float


def member_weights(members: Sequence[State], weights: Sequence[float] | None) -> list[float]:
    """The members' weights as given, or all 1.

    Raises:
        ConfigError: they do not fit, or there are no members.
    """
    raw = [1.0] * len(members) if weights is None else [float(w) for w in weights]
    if not members or len(raw) != len(members) or not all(0 < w < math.inf for w in raw):
        raise ConfigError(f"{len(members)} members need as many weights, all positive, not {tuple(raw)}.")
    return raw


def hidden_sites(spec: PermutationSpec, model: nn.Module) -> tuple[dict[str, int], list[str]]:
    """Modules whose outputs are hidden neurons, affine in a weight and a bias: name -> number of neurons; and those
    that can't be rescaled.
    """
    found, left_out = {}, []
    tied = {*spec.aliases, *spec.aliases.values()}
    for name, module in model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        hidden = 0 in spec.axes.get(f"{name}.weight", {})
        if not hidden or not isinstance(weight, Tensor):
            continue
        known = isinstance(module, CHANNELS_LAST + CHANNELS_SECOND)
        whole = not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) == 1
        if isinstance(bias, Tensor) and known and whole and f"{name}.weight" not in tied:
            found[name] = weight.shape[0]
        else:
            left_out.append(name)
    return found, left_out


class NeuronMoments:
    """Count, mean [neurons] and centred sum of squares [neurons] of the samples seen so far, float64."""

    def __init__(self) -> None:
        self.count = 0.0
        self.centre = self.spread = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in samples [samples, neurons] (Chan's way to join the moments of two sets)."""
        if not len(rows):
            return
        rows = rows.double()
        count, mean = float(len(rows)), torch.mean(rows, dim=0)
        spread = (rows - mean).square().sum(dim=0)
        step, share = mean - self.centre, count / (self.count + count)
        self.spread = self.spread + spread + step.square() * self.count * share
        self.centre = self.centre + step * share
        self.count += count

    def result(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (of the population).

        Raises:
            DataError: they are not finite; names the module `name`.
        """
        if not self.count:
            raise DataError(f"The batches are empty: {name!r} has no outputs to measure.")
        if not is_finite(self.centre + self.spread):
            raise DataError(
                f"The outputs of {name!r} are not finite on these batches, so they can't be repaired."
            )
        return self.centre, (self.spread / self.count).sqrt()


def measure(
    model: nn.Module, sites: Mapping[str, int], batches: Sequence[Any], call: Forward, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation [neurons], float64, of each site over all samples and positions, in the order in
    which the sites run.
    """
    found: dict[str, NeuronMoments] = {}

    def hook(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        found.setdefault(name, NeuronMoments()).add(by_neuron(module, args, output, sites[name]))

    watched = {name: model.get_submodule(name) for name in sites}
    with hooked(watched, hook), torch.no_grad(), eval_mode(model):
        for batch in batches:
            with computing(batch):
                call(model, to_device(batch, device))
    if not batches:
        raise DataError(NO_SAMPLES)
    return {name: moments.result(name) for name, moments in found.items()}


def by_neuron(module: nn.Module, args: Any, output: Tensor, neurons: int, of: Tensor | None = None) -> Tensor:
    """[samples and positions, neurons] of a module's output, or of a tensor `of` with the same dimensions."""
    tensor = output if of is None else of
    return tensor.detach().movedim(channels(module, args, output, neurons), -1).reshape(-1, neurons)


def channels(module: nn.Module, args: Any, output: Tensor, neurons: int) -> int:
    """The dimension of the neurons. A class derived from torch's may move it: it is then told by its size, and if
    several dimensions have that size by what the first neuron's bias changes.
    """
    usual = 1 if isinstance(module, CHANNELS_SECOND) else -1
    if output.shape[usual] == neurons and type(module).__module__.startswith("torch."):
        return usual
    fitting = [d for d in range(1, output.ndim) if output.shape[d] == neurons]
    if len(fitting) > 1:
        fitting = [d for d in fitting if _moves_first_only(module, args, output, d)]
    if len(fitting) != 1:
        raise DataError(
            f"It can't be told which dimension of the output {tuple(output.shape)} of a {type(module).__name__} has its"
            f" {neurons} neurons: give inputs of another size."
        )
    return fitting[0]


def _moves_first_only(module: nn.Module, args: Any, output: Tensor, dim: int) -> bool:
    """Whether another bias of the first neuron changes the output at index 0 of `dim` and nowhere else."""
    bias = module.bias
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        before = bias.clone()
        bias[0] += 1
        moved = module.forward(*args) - output  # not module(...), whose hooks would run again
        bias.copy_(before)
        here, elsewhere = moved.split([1, moved.shape[dim] - 1], dim)
        return bool((here.abs() > 0.5).all()) and bool((elsewhere.abs() < 0.5).all())


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """BatchNorms that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None
    }


def ratio(goal: Tensor, std: Tensor) -> Tensor:
    """goal / std, and 1 where there is hardly anything to scale."""
    alive = std > DEAD * std.max()
    return torch.where(alive, goal / torch.where(alive, std, 1.0), 1.0)


class Rescaling:
    """The layers of a merge that were rescaled so far: their new tensors, and module -> mean factor."""

    def __init__(self, merge: nn.Module) -> None:
        self.modules = dict(merge.named_modules())
        self.scales: dict[str, float] = {}
        self.tensors: dict[str, Tensor] = {}

    def apply(self, name: str, moments: tuple[Tensor, Tensor], goal: tuple[Tensor, Tensor]) -> None:
        """Change a module in place whose neurons have these means and standard deviations, so that they have the
        goal's: its output y becomes scale * y + shift, both [neurons].
        """
        (mean, std), (goal_mean, goal_std) = moments, goal
        scale = ratio(goal_std, std)
        shift = goal_mean - scale * mean
        weight, bias = self.modules[name].weight, self.modules[name].bias
        assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
        with torch.no_grad():
            weight.mul_(scale.to(weight).reshape(-1, *[1] * (weight.ndim - 1)))
            bias.copy_((bias.double() * scale + shift).to(bias))
        self.tensors |= {f"{name}.weight": weight.detach(), f"{name}.bias": bias.detach()}
        self.scales[name] = float(scale.mean())


def replaced(state: State, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with other values for some tensors, in its own types and where they were."""
    return {
        name: changed[name].to(tensor.device, tensor.dtype) if name in changed else tensor
        for name, tensor in state.items()
    }


def working_copy(
    model: nn.Module, state: State, device: torch.device | str | None, what: str = "the merge"
) -> tuple[nn.Module, torch.device]:
    """A copy of `model` with the weights of `state`, in at least float32; and where it is."""
    where = device_of(model) if device is None else find_device(device)
    work = duplicate(model)
    require_state(state, what)
    tensors = dict(state)
    half = any(t.is_floating_point() and t.dtype.itemsize < 4 for t in tensors.values())
    work = work.float() if half else work
    give_weights(work, tensors, what)
    return work.to(where).eval(), where

"""Hidden neurons of a network as REPAIR sees them: the modules whose outputs they are, and moments of those outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from ..errors import ConfigError, DataError
from ..objectives.base import eval_mode
from ..spec import PermutationSpec
from ..types import State

Forward = Callable[[nn.Module, Any], Any]
Hook = Callable[[nn.Module, Any, Any], None]

CHANNELS_LAST = (nn.Linear, nn.LayerNorm)
CHANNELS_SECOND = (nn.Conv1d, nn.Conv2d, nn.Conv3d, _BatchNorm, nn.GroupNorm)
DEAD = 1e-6
"""A neuron that varies by less than this share of its layer's most lively one is shifted, but not scaled."""


def member_weights(members: Sequence[State], weights: Sequence[float] | None) -> list[float]:
    """The members' weights as given, or all 1.

    Raises:
        ConfigError: they do not fit, or there are no members.
    """
    raw = [1.0] * len(members) if weights is None else [float(w) for w in weights]
    if not members or len(raw) != len(members) or not all(w > 0 for w in raw):
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
        self.centre: Tensor | None = None
        self.spread: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Take in samples [samples, neurons] (Chan's way to join the moments of two sets)."""
        rows = rows.double()
        count, mean = float(len(rows)), torch.mean(rows, dim=0)
        spread = (rows - mean).square().sum(dim=0)
        if self.centre is None or self.spread is None:
            self.count, self.centre, self.spread = count, mean, spread
            return
        step, share = mean - self.centre, count / (self.count + count)
        self.spread = self.spread + spread + step.square() * self.count * share
        self.centre = self.centre + step * share
        self.count += count

    def result(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (of the population).

        Raises:
            DataError: they are not finite; names the module `name`.
        """
        assert self.centre is not None and self.spread is not None
        if not bool(torch.isfinite(self.centre + self.spread).all()):
            raise DataError(
                f"The outputs of {name!r} are not finite on these batches, so they can't be repaired."
            )
        return self.centre, (self.spread / self.count).sqrt()


def measure(
    model: nn.Module,
    sites: Mapping[str, int],
    batches: Sequence[Any],
    call: Forward,
    device: torch.device,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation [neurons], float64, of each site over all samples and positions, in the order in
    which the sites run.
    """
    found: dict[str, NeuronMoments] = {}

    def watch(name: str, neurons: int) -> Hook:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found.setdefault(name, NeuronMoments()).add(by_neuron(module, args, output, neurons))

        return hook

    modules = dict(model.named_modules())
    with hooked({modules[name]: watch(name, n) for name, n in sites.items()}), eval_mode(model):
        for batch in batches:
            call(model, on(device, batch))
    if not batches:
        raise DataError("There are no batches to measure activations on.")
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


def affine(module: nn.Module, scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """Change the module so that its output y becomes scale * y + shift, both [neurons]; its new weight and bias."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    with torch.no_grad():
        weight.mul_(scale.to(weight).reshape(-1, *[1] * (weight.ndim - 1)))
        bias.copy_((bias.double() * scale + shift).to(bias))
    return {"weight": weight.detach(), "bias": bias.detach()}


@contextmanager
def hooked(hooks: Mapping[nn.Module, Hook]) -> Iterator[None]:
    """Forward hooks, and no gradients, for the time of a `with`."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def working_copy(
    model: nn.Module, state: State, device: torch.device | str | None
) -> tuple[nn.Module, torch.device]:
    """A copy of `model` with the weights of `state`, in at least float32; and where it is."""
    where = torch.device(next(model.parameters()).device if device is None else device)
    work = copy.deepcopy(model)
    tensors = dict(state)
    half = any(t.is_floating_point() and t.dtype.itemsize < 4 for t in tensors.values())
    work = work.float() if half else work
    work.load_state_dict(tensors)
    return work.to(where).eval(), where


def on(device: torch.device, batch: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), batch)

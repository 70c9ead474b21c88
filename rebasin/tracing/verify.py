"""Proof before use: a random member of the group must not change what the model computes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..errors import VerificationError
from ..spec import Permutation, PermutationSpec
from ..tensors.modules import device_of
from ..types import State
from .export import evaluation_mode, named_outputs


@dataclass(frozen=True)
class VerificationReport:
    """Relative L2 error of each output under a permutation; `guilty` are the groups that break it, if any."""

    errors: Mapping[str, float]
    tolerance: float
    dtype: str
    moved: int
    guilty: tuple[str, ...] = ()

    @property
    def max_relative_error(self) -> float:
        return max(self.errors.values(), default=0.0)

    @property
    def passed(self) -> bool:
        return self.max_relative_error < self.tolerance

    def require(self) -> VerificationReport:
        """Raise `VerificationError` unless the proof succeeded."""
        if not self.passed:
            worst = max(self.errors, key=lambda name: self.errors[name])
            raise VerificationError(
                f"The permutations change {worst!r} by {self.errors[worst]:.2e} relative (allowed"
                f" {self.tolerance:.0e}); the groups to blame are {', '.join(self.guilty) or 'unknown'}."
            )
        return self


def verify(
    model: nn.Module,
    spec: PermutationSpec,
    *args: Any,
    permutation: Permutation | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    randomise: bool = True,
    find_guilty: bool = True,
    **kwargs: Any,
) -> VerificationReport:
    """Apply a random member of the group (or `permutation`) and compare all outputs on these inputs.

    A copy of the model is computed with, in `dtype` (default: its own; float64 leaves the least doubt). `randomise`
    adds noise to its parameters and running statistics first, so that ones and zeros of fresh norms hide nothing;
    random matrices and inputs of unit scale keep the outputs in a sane range. The tolerance is 1e-5 in fp32 and 1e-9
    in fp64. On failure the guilty groups are found by bisection.
    """
    if device_of(model).type == "meta":
        raise VerificationError(
            "A model on the meta device has no numbers to verify; build a small configuration of it, or real weights."
        )
    dtype = dtype or next((p.dtype for p in model.parameters()), torch.float32)
    dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    probe = copy.deepcopy(model)
    for tensor in (*probe.parameters(), *probe.buffers()):  # not probe.to(): some models guard it
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    if randomise:
        _randomise(probe, seed)
    args, kwargs = tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs)
    )
    state = {name: tensor.detach().clone() for name, tensor in probe.state_dict().items()}
    permutation = permutation or spec.random(seed)
    own = probe.state_dict()

    def outputs(state: State) -> dict[str, Tensor]:
        for name, tensor in own.items():  # in place: tied weights stay tied, and no loading hook interferes
            tensor.copy_(state[name])
        precision = _DoublePrecision() if dtype == torch.float64 else contextlib.nullcontext()
        with torch.no_grad(), evaluation_mode(probe), torch.random.fork_rng(devices=[]), precision:
            torch.manual_seed(seed)  # random operators, if any, draw the same numbers in every call
            return {n: t.double() for n, t in named_outputs(probe(*args, **kwargs)).items()}

    expected = outputs(state)

    def errors(p: Permutation) -> dict[str, float]:
        return {n: _relative_error(t, expected[n]) for n, t in outputs(p.apply(state)).items()}

    found = errors(permutation)
    report = VerificationReport(found, tolerance, str(dtype).removeprefix("torch."), permutation.moved())
    if not find_guilty or all(e < tolerance for e in found.values()):
        return report
    guilty = _bisect(
        [g.name for g in spec],
        lambda names: max(errors(_only(spec, permutation, names)).values()) >= tolerance,
    )
    return replace(report, guilty=tuple(guilty))


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    if not bool(torch.isfinite(expected).all()):
        return float("inf")
    return float((actual - expected).norm()) / (float(expected.norm()) or 1.0)


def _only(spec: PermutationSpec, permutation: Permutation, names: Iterable[str]) -> Permutation:
    """`permutation` on the groups of these names, the identity elsewhere."""
    chosen = set(names)
    index = {
        cell.name: permutation.index[cell.name] if group.name in chosen else np.arange(cell.size)
        for group in spec
        for cell in group.cells
    }
    return Permutation(spec, index)


def _bisect(names: list[str], fails: Any, limit: int = 3) -> list[str]:
    """Up to `limit` names that fail each on its own; halves that fail only together are reported together."""
    if not names or not fails(names):
        return []
    if len(names) == 1:
        return names
    half = len(names) // 2
    left = _bisect(names[:half], fails, limit)
    right = _bisect(names[half:], fails, limit - len(left)) if len(left) < limit else []
    return left + right or names[:limit]


def _randomise(model: nn.Module, seed: int) -> None:
    """Matrices ~ N(0, 1 / fan_in), vectors moved by N(0, 0.3), variances in [0.5, 1.5]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)

    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if parameter.ndim >= 2:
                fan_in = max(parameter[0].numel(), 1)
                parameter.copy_(normal(parameter) * fan_in**-0.5)
            else:
                parameter.add_(normal(parameter), alpha=0.3)
        for name, buffer in model.named_buffers():
            if name not in dict.fromkeys(model.state_dict()) or not buffer.is_floating_point():
                continue
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator).to(buffer))
            elif name.endswith("running_mean"):
                buffer.add_(normal(buffer), alpha=0.3)


class _DoublePrecision(TorchDispatchMode):
    """Models that compute a norm or an angle in float32 on purpose do it in float64 here, or 1e-9 means nothing."""

    def __enter__(self) -> Any:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # what integers become
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        torch.set_default_dtype(self.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in (torch.float32, torch.float16, torch.bfloat16):
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)

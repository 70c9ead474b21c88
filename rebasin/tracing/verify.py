"""Proof before use: random members of the group must not change what the model computes."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..arguments import typed
from ..errors import ConfigError, TraceError, VerificationError
from ..spec import Alignment, Permutation, PermutationSpec
from ..tensors.memory import on_copies, place, sharing
from ..tensors.modules import changeable, device_of
from ..tensors.precision import full_precision
from ..types import brief
from . import cache
from .export import evaluation_mode, named_outputs

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Member = Permutation | Alignment
_MAP = "map of "
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
_LARGE = 1 << 19
"""Models with more parameters get two members of the group and two inputs, smaller ones four and three."""
_FLIPPED = 0.01
"""Share of whole numbers in an output (a class, a mask) that rounding may turn over."""


@brief
@dataclass(frozen=True)
class VerificationReport:
    """Relative L2 error of each output under a permutation, the largest over all members and inputs that were tried.

    `guilty` are the groups that break it; `problem` is the sentence that says why nothing is proved, if so. `maps` is
    how many continuous groups were tried, too.
    """

    errors: Mapping[str, float]
    tolerance: float
    dtype: str
    moved: int
    guilty: tuple[str, ...] = ()
    problem: str = ""
    maps: int = 0

    @property
    def max_relative_error(self) -> float:
        largest = max(self.errors.values(), default=math.inf)
        return math.inf if self.problem else largest

    @property
    def passed(self) -> bool:
        return self.max_relative_error < self.tolerance

    def require(self) -> VerificationReport:
        """Raise `VerificationError` unless the proof succeeded."""
        if self.problem:
            raise VerificationError(self.problem)
        if not self.passed:
            worst = max(self.errors, key=lambda name: self.errors[name])
            raise VerificationError(
                f"The {'maps' if self.maps else 'permutations'} change {worst!r} by {self.errors[worst]:.2e} relative"
                f" (allowed {self.tolerance:.0e}); the groups to blame are {', '.join(self.guilty) or 'unknown'}."
            )
        return self


@typed
def verify(
    model: nn.Module,
    spec: PermutationSpec,
    *args: Any,
    permutation: Permutation | Alignment | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    randomise: bool = True,
    find_guilty: bool = True,
    **kwargs: Any,
) -> VerificationReport:
    """Apply random members of the group (or `permutation`) and compare all outputs, on these inputs and others.

    In float64 half of the members have a random matrix for each continuous group, but for those that would divide by
    gains that are zero; float32 is too coarse for them.

    The model itself computes, with its hooks, parametrizations and shared memory, on copies of its tensors in `dtype`
    (default: float64 if it has any, else float32; float64 leaves the least doubt; a model that can't be computed in it
    is computed in its own types, and the report says so). The other inputs are made from the given ones: other
    numbers, and another batch size where the model takes it. `randomise` adds noise to parameters and running
    statistics first, so that ones and zeros of fresh norms hide nothing. The tolerance is 1e-5 in fp32 and 1e-9 in
    fp64. On failure the guilty groups are found by bisection. Outputs that are not finite, or nothing but zero, prove
    nothing, and fail.

    The error is one L2 norm for each output, so what is harmed must be large enough to count in it: a part of an output
    that is 1e-12 as large as the rest may change freely. Return such a part as an output of its own to have it proved.

    Raises:
        ConfigError: `dtype` is neither of the two.
        TraceError: an output can't be looked into.
        VerificationError: the model has no numbers, or can't be computed on these inputs.
    """
    device, own = device_of(model), [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(t) for t in own):
        raise VerificationError("The model has parameters without a shape; call it once before verifying it.")
    if device.type == "meta":
        raise VerificationError(
            "A model on the meta device has no numbers to verify; build a small configuration of it, or real weights."
        )
    model = changeable(model)
    types = {t.dtype.to_real() for t in own if t.is_floating_point() or t.is_complex()}
    if dtype not in (None, torch.float32, torch.float64):
        raise ConfigError(f"dtype is {dtype}, but verify computes in torch.float32 or torch.float64.")
    if dtype is None:
        dtype = torch.float64 if torch.float64 in types else torch.float32
    least = min(types & set(TOLERANCE), key=lambda t: t.itemsize, default=torch.float32)
    failure: Exception | None = None
    # Casts that a model writes out become float64 too, unless it does not stand it; at last it has its own types.
    for chosen, casts in ((dtype, dtype == torch.float64), (dtype, False), (None, False)):
        for noise in ("normal", "scaled", "") if randomise else ("",):
            probe = _Probe(model, spec, (args, kwargs), chosen, casts, seed)
            with full_precision(device), probe.computing(noise):
                try:
                    expected = probe.outputs(probe.inputs)
                except TraceError:
                    raise
                except Exception as error:
                    failure = error
                    break
                precision = chosen or least
                name, errors = str(precision).removeprefix("torch."), dict.fromkeys(expected, 0.0)
                report = VerificationReport(
                    errors, TOLERANCE[precision], name, 0, problem=_no_proof(expected)
                )
                if not report.problem:
                    return probe.report(report, expected, permutation, find_guilty)
        else:
            return report
    first = next((line.strip() for line in str(failure).splitlines() if line.strip()), type(failure).__name__)
    told = f"The model can't be computed on these inputs: {first[:200].rstrip('.')}."
    raise VerificationError(told) from failure


@dataclass
class _Probe:
    """A model that computes on copies of its tensors: what `verify` asks about one choice of types and noise."""

    model: nn.Module
    spec: PermutationSpec
    inputs: Inputs
    dtype: torch.dtype | None
    casts: bool
    seed: int

    @contextlib.contextmanager
    def computing(self, noise: str) -> Iterator[None]:
        types: dict[torch.dtype, torch.dtype] = {}
        if self.dtype is not None:
            types = dict.fromkeys(TOLERANCE, self.dtype)
            types |= dict.fromkeys((torch.complex64, torch.complex128), self.dtype.to_complex())
        self.inputs = tree_map_only(Tensor, lambda t: t.to(types.get(t.dtype, t.dtype)), self.inputs)
        device = device_of(self.model)
        seeded = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with (
            on_copies(self.model, types) as self.attributes,
            torch.no_grad(),
            evaluation_mode(self.model),
            seeded,
        ):
            _randomise(self.model, self.seed, noise)
            own = {n: t for n, t in self.model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
            shared = sharing(own, {})
            self.shared = {n for v in shared.views for n in (v.name, v.base)} | {*shared.aliases}
            # What repeats itself can't be written to, and need not: the engine pins it.
            self.own = {n: t for n, t in own.items() if shared.clashes.get(n) != "itself"}
            self.state = {name: tensor.detach().clone() for name, tensor in self.own.items()}
            known = {id(t) for t in own.values()}
            self.rest = [(b, b.clone()) for b in self.model.buffers() if id(b) not in known]
            yield

    def outputs(self, inputs: Inputs, permutation: Member | None = None) -> dict[str, Tensor]:
        """What the model gives under a permutation of its state, which is written where the model has it."""
        self.attributes.restore()
        self.model.eval()
        for buffer, value in self.rest:
            buffer.copy_(value)
        moved = self.state if permutation is None else permutation.view(self.state)
        for name in self.state:
            self.own[name].detach().copy_(moved[name])
        args, kwargs = tree_map_only(Tensor, torch.clone, inputs)  # a model may write into its inputs
        torch.manual_seed(self.seed)  # random operators, if any, draw the same numbers in every call
        with _DoublePrecision() if self.casts else contextlib.nullcontext():
            return {n: _wide(t) for n, t in named_outputs(self.model(*args, **kwargs)).items()}

    def cases(self, expected: dict[str, Tensor], large: bool) -> list[tuple[Inputs, dict[str, Tensor]]]:
        """The given inputs and those of our own making that the model takes and gives numbers for, with its outputs."""
        found = [(self.inputs, expected)]
        for make, seed in ((_rebatched, self.seed), (_varied, self.seed + 1)):
            if len(found) < (2 if large else 3):
                with contextlib.suppress(Exception):
                    made = make(self.inputs, seed)
                    outputs = self.outputs(made)
                    found += [] if _no_proof(outputs) else [(made, outputs)]
        return found

    def report(
        self, report: VerificationReport, expected: dict[str, Tensor], given: Member | None, blame: bool
    ) -> VerificationReport:
        large = sum(p.numel() for p in self.model.parameters()) > _LARGE
        cases = self.cases(expected, large)
        count = 1 if given is not None else 2 if large else 4
        members: list[Member] = [given or self.spec.random(self.seed + k) for k in range(count)]
        if given is None and self.dtype == torch.float64 and self.spec.continuous:
            held = self.spec.stuck(self.state)
            for k in range(1, count, 2):
                members[k] = self.spec.random_alignment(self.seed + k).without(held)
        tried = max(len(m.maps) if isinstance(m, Alignment) else 0 for m in members)
        worst, report = dict(report.errors), replace(report, moved=members[0].moved(), maps=tried)
        for number, member in enumerate(members):
            # A large model computes each member on one input, a given one on all.
            for case in cases[number % len(cases) :][:1] if large and count > 1 else cases:
                found = self.errors(*case, member)
                worst |= {name: max(error, worst.get(name, 0.0)) for name, error in found.items()}
                if all(error < report.tolerance for error in found.values()):
                    continue
                if given is None:
                    cache.discard(self.spec)
                fails = partial(self.fails, case, member, report.tolerance)
                names = [g.name for g in self.spec]
                names += [_MAP + name for name in member.maps] if isinstance(member, Alignment) else []
                guilty = _bisect(names, fails) if blame else []
                return replace(report, errors=worst, moved=member.moved(), guilty=tuple(guilty))
        return replace(report, errors=worst)

    def fails(self, case: tuple[Inputs, Any], member: Member, tolerance: float, names: list[str]) -> bool:
        """Whether the groups of these names alone change the outputs."""
        return max(self.errors(*case, _only(self.spec, member, names)).values()) >= tolerance

    def errors(self, inputs: Inputs, expected: dict[str, Tensor], permutation: Member) -> dict[str, float]:
        try:
            actual = self.outputs(inputs, permutation)
        except Exception:
            return dict.fromkeys(expected, math.inf)
        found = {n: _relative_error(actual.get(n), t) for n, t in expected.items()}
        moved = permutation.view(self.state)
        for name in self.shared:  # after all writes it holds what the permutation says, or two names disagree
            if not torch.equal(self.own[name], moved[name]):
                found[f"the shared memory of {name}"] = math.inf
        return found


def _wide(tensor: Tensor) -> Tensor:
    """All that a tensor holds as plain numbers, whatever its layout, in double precision."""
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    elif tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def _relative_error(actual: Tensor | None, expected: Tensor) -> float:
    if actual is None or actual.shape != expected.shape:
        return math.inf
    if not (expected.is_floating_point() or expected.is_complex()):
        flipped = float((actual != expected).double().mean()) if expected.numel() else 0.0
        return flipped if flipped > _FLIPPED else 0.0
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(actual), finite) or not torch.equal(actual[~finite], expected[~finite]):
        return math.inf
    error = float((actual - expected)[finite].norm()) / (float(expected[finite].norm()) or 1.0)
    return error if math.isfinite(error) else math.inf


def _no_proof(outputs: Mapping[str, Tensor]) -> str:
    """Why these outputs can't prove anything; empty if they can."""
    for name, t in outputs.items():
        if t.numel() and (bool(t.isnan().any()) or not bool(t.isfinite().any())):
            return (
                f"The model's {name!r} is not finite on these inputs, so nothing is proved; give it others."
            )
    floating = (t for t in outputs.values() if t.is_floating_point() or t.is_complex())
    if not any(bool((t.isfinite() & (t != 0)).any()) for t in floating):
        return "Nothing was compared: the model's outputs have no floating point number but zero; verify a part of it."
    return ""


def _varied(inputs: Inputs, seed: int) -> Inputs:
    """Other numbers of the same scale; whole numbers stay between the smallest and the largest, masks as they are, and
    so do the types and layouts in which torch can't draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def vary(t: Tensor) -> Tensor:
        if not t.numel() or t.dtype == torch.bool:
            return t
        try:
            return drawn(t)
        except (NotImplementedError, RuntimeError, ValueError):
            return t

    def drawn(t: Tensor) -> Tensor:
        if t.is_floating_point() or t.is_complex():
            noise = torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device)
            return t + noise * (t.std(correction=0) or 1.0)
        low, high = int(t.min()), int(t.max())
        return torch.randint(low, high + 1, t.shape, generator=generator).to(t)

    return tree_map_only(Tensor, vary, inputs)


def _rebatched(inputs: Inputs, seed: int) -> Inputs:
    """Other numbers in another batch size: a sample less, or one twice, on all tensors that have the batch's size."""
    sizes = [t.shape[0] for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim]

    def other(t: Tensor) -> Tensor:
        if not t.ndim or t.shape[0] != sizes[0]:
            return t
        return t[:-1] if sizes[0] > 1 else torch.cat([t, t])

    return _varied(tree_map_only(Tensor, other, inputs), seed)


def _only(spec: PermutationSpec, member: Member, names: Iterable[str]) -> Member:
    """`member` on the groups of these names, the identity elsewhere."""
    chosen = set(names)
    permutation = member.permutation if isinstance(member, Alignment) else member
    index = {
        cell.name: permutation.index[cell.name] if group.name in chosen else np.arange(cell.size)
        for group in spec
        for cell in group.cells
    }
    only = Permutation(spec, index)
    if isinstance(member, Permutation):
        return only
    return Alignment(only, {name: maps for name, maps in member.maps.items() if _MAP + name in chosen})


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


@torch.no_grad()
def _randomise(model: nn.Module, seed: int, noise: str) -> None:
    """Matrices ~ N(0, 1 / fan_in), vectors moved by N(0, 0.3), variances in [0.5, 1.5]; nothing if `noise` is "".

    "scaled": all are multiplied by factors around one instead, for models that take roots of their parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    if not noise:
        return

    def normal(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t)

    for parameter in model.parameters():
        where = place(parameter)
        if where is None or where.repeats or not (parameter.is_floating_point() or parameter.is_complex()):
            continue
        if noise == "scaled":
            parameter.mul_(torch.exp(0.3 * normal(parameter).real.to(parameter)))
        elif parameter.ndim >= 2:
            parameter.copy_(normal(parameter) * max(parameter[0].numel(), 1) ** -0.5)
        else:
            parameter.add_(normal(parameter), alpha=0.3)
    for name, buffer in model.named_buffers():
        if not buffer.is_floating_point():
            continue
        if name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator).to(buffer))
        elif name.endswith("running_mean"):
            buffer.add_(normal(buffer), alpha=0.3)


_SWITCH = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"


class _DoublePrecision(TorchDispatchMode):
    """Models that compute a norm or an angle in float32 on purpose do it in float64 here, or 1e-9 means nothing."""

    supports_higher_order_operators = True
    compiled = False  # by `torch.cond` and its like

    def __enter__(self) -> Any:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # what integers become
        # flex_attention compiles itself, which no mode stands: it has a switch.
        self.flex: Any = sys.modules.get("torch.nn.attention.flex_attention")
        self.uncompiled = getattr(self.flex, _SWITCH, None)
        if self.uncompiled is not None:
            setattr(self.flex, _SWITCH, True)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        torch.set_default_dtype(self.default)
        if self.uncompiled is not None:
            setattr(self.flex, _SWITCH, self.uncompiled)
        if self.compiled:
            torch._dynamo.reset()  # what was compiled under a mode fails without it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        self.compiled |= isinstance(func, torch._ops.HigherOrderOperator)
        if kwargs.get("dtype") in (torch.float32, torch.float16, torch.bfloat16):
            kwargs["dtype"] = torch.float64
        elif kwargs.get("dtype") == torch.complex64:
            kwargs["dtype"] = torch.complex128
        return func(*args, **kwargs)

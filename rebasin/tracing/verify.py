"""Proof before use: random members of the group must not change what the model computes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import TraceError, VerificationError
from ..spec import Permutation, PermutationSpec
from ..tensors.memory import on_copies, place, sharing
from ..tensors.modules import device_of
from ..tensors.precision import full_precision
from . import cache
from .export import evaluation_mode, named_outputs

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
_LARGE = 1 << 19
"""Models with more parameters get two members of the group and two inputs, smaller ones four and three."""
_FLIPPED = 0.01
"""Share of whole numbers in an output (a class, a mask) that rounding may turn over."""


@dataclass(frozen=True)
class VerificationReport:
    """Relative L2 error of each output under a permutation, the largest over all members and inputs that were tried.

    `guilty` are the groups that break it; `problem` is the sentence that says why nothing is proved, if so.
    """

    errors: Mapping[str, float]
    tolerance: float
    dtype: str
    moved: int
    guilty: tuple[str, ...] = ()
    problem: str = ""

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
    """Apply random members of the group (or `permutation`) and compare all outputs, on these inputs and others.

    The model itself computes, with its hooks, parametrizations and shared memory, on copies of its tensors in `dtype`
    (default: float64 if it has any, else float32; float64 leaves the least doubt; a model that can't be computed in it
    is computed in its own types, and the report says so). The other inputs are made from the given ones: other
    numbers, and another batch size where the model takes it. `randomise` adds noise to parameters and running
    statistics first, so that ones and zeros of fresh norms hide nothing. The tolerance is 1e-5 in fp32 and 1e-9 in
    fp64. On failure the guilty groups are found by bisection. Outputs that are not finite, or nothing but zero, prove
    nothing, and fail.

    Raises:
        TraceError: an output can't be looked into.
        VerificationError: the model has no numbers, or can't be computed on these inputs.
    """
    device = device_of(model)
    tensors = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(t) for t in tensors):
        raise VerificationError(
            "The model has parameters without a shape; call it once on an input before verifying it."
        )
    if device.type == "meta":
        raise VerificationError(
            "A model on the meta device has no numbers to verify; build a small configuration of it, or real weights."
        )
    own = {t.dtype for t in tensors if t.is_floating_point() or t.is_complex()}
    if dtype is None or dtype not in TOLERANCE or dtype.itemsize < 4:
        dtype = torch.float64 if own & {torch.float64, torch.complex128} else torch.float32
    failure: Exception | None = None
    # Casts that a model writes out are turned into float64 too, unless it does not stand it; else its own types.
    for types, casts in ((dtype, True), (dtype, False), (None, False)):
        if casts and dtype != torch.float64:
            continue
        for noise in ("normal", "scaled", "") if randomise else ("",):
            probe = _Probe(model, spec, (args, kwargs), types, casts, seed, own)
            with full_precision(device), probe.computing(noise):
                try:
                    report = probe.report(permutation, find_guilty)
                except _Uncomputable as error:
                    failure = error.__cause__ if isinstance(error.__cause__, Exception) else error
                    break
            if not report.problem or not noise:
                if not report.passed and permutation is None:
                    cache.discard(spec)
                return report
    first = next((line.strip() for line in str(failure).splitlines() if line.strip()), type(failure).__name__)
    raise VerificationError(
        f"The model can't be computed on these inputs: {first[:200].rstrip('.')}."
    ) from failure


class _Uncomputable(Exception):
    """The model raises on the inputs that were given."""


class _Probe:
    """A model that computes on copies of its tensors: what `verify` asks about one choice of types and noise."""

    def __init__(
        self,
        model: nn.Module,
        spec: PermutationSpec,
        inputs: Inputs,
        dtype: torch.dtype | None,
        casts: bool,
        seed: int,
        own: set[torch.dtype],
    ) -> None:
        self.model, self.spec, self.dtype, self.seed = model, spec, dtype, seed
        self.types: dict[torch.dtype, torch.dtype] = {}
        if dtype is not None:
            wide = torch.complex128 if dtype == torch.float64 else torch.complex64
            self.types = {
                t: wide if t.is_complex else dtype
                for t in own | {torch.float16, torch.float32, torch.float64}
            }
            self.types |= {torch.bfloat16: dtype, torch.complex64: wide}
        precise = dtype or min(
            (t for t in own if t in TOLERANCE), key=lambda t: t.itemsize, default=torch.float32
        )
        self.name, self.tolerance = str(precise).removeprefix("torch."), TOLERANCE[precise]
        self.inputs = tree_map_only(Tensor, lambda t: t.to(self.types.get(t.dtype, t.dtype)), inputs)
        self.casts = casts

    @contextlib.contextmanager
    def computing(self, noise: str) -> Iterator[None]:
        device = device_of(self.model)
        seeded = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with (
            on_copies(self.model, self.types) as attributes,
            torch.no_grad(),
            evaluation_mode(self.model),
            seeded,
        ):
            if noise:
                _randomise(self.model, self.seed, noise)
            self.attributes = attributes
            own = {n: t for n, t in self.model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
            known = {id(t) for t in own.values()}
            self.rest = [(b, b.clone()) for b in self.model.buffers() if id(b) not in known]
            shared = sharing(own, {})
            self.own = {
                n: t for n, t in own.items() if shared.clashes.get(n) != "itself"
            }  # not to be written
            self.state = {name: tensor.detach().clone() for name, tensor in self.own.items()}
            views = {n for view in shared.views for n in (view.name, view.base)}
            self.shared = views | {n for pair in shared.aliases.items() for n in pair}
            yield

    def outputs(self, inputs: Inputs, permutation: Permutation | None = None) -> dict[str, Tensor]:
        """What the model gives under a permutation of its state, which is written where the model has it."""
        self.attributes.restore()
        self.model.eval()
        for buffer, value in self.rest:
            buffer.copy_(value)
        moved = permutation is None or permutation.is_identity
        for name, tensor in self.own.items():
            value = self.state[name]
            tensor.detach().copy_(
                value if moved or permutation is None else permutation.apply_to(name, value)
            )
        args, kwargs = tree_map_only(Tensor, torch.clone, inputs)  # a model may write into its inputs
        torch.manual_seed(self.seed)  # random operators, if any, draw the same numbers in every call
        with _DoublePrecision() if self.casts else contextlib.nullcontext():
            found = named_outputs(self.model(*args, **kwargs))
        return {n: _wide(t) for n, t in found.items()}

    def tried(self, inputs: Inputs) -> dict[str, Tensor] | None:
        """The outputs for inputs of our own making; None if the model does not take them or gives no numbers."""
        try:
            found = self.outputs(inputs)
        except TraceError:
            raise
        except Exception:
            return None
        return found if not _not_finite(found) else None

    def report(self, permutation: Permutation | None, find_guilty: bool) -> VerificationReport:
        try:
            expected = [(self.inputs, self.outputs(self.inputs))]
        except TraceError:
            raise
        except Exception as error:
            raise _Uncomputable from error
        report = VerificationReport(dict.fromkeys(expected[0][1], 0.0), self.tolerance, self.name, 0)
        problem = _no_proof(expected[0][1])
        if problem:
            return replace(report, problem=problem)
        large = sum(p.numel() for p in self.model.parameters()) > _LARGE
        makers = [_rebatched, _varied] if not large else [_rebatched]
        for make in makers:
            other = make(self.inputs, self.seed)
            found = self.tried(other)
            if found is None and make is _rebatched:
                other = _varied(self.inputs, self.seed + 1)
                found = self.tried(other)
            if found is not None:
                expected.append((other, found))
        members = [permutation or self.spec.random(self.seed)]
        if permutation is None:
            members += [self.spec.random(self.seed + k) for k in range(1, 2 if large else 4)]
        report = replace(report, moved=members[0].moved())
        worst = dict(report.errors)
        for number, member in enumerate(members):
            # A large model sees each member on one input, the first on the first.
            chosen = expected if not large or len(members) == 1 else [expected[number % len(expected)]]
            for inputs, wanted in chosen:
                found = self.errors(inputs, wanted, member)
                worst = {
                    n: max(e, found.get(n, 0.0))
                    for n, e in (worst | dict.fromkeys(found, 0.0) | worst).items()
                }
                if all(e < self.tolerance for e in found.values()):
                    continue
                report = replace(report, errors=worst, moved=member.moved())
                if not find_guilty:
                    return report
                guilty = _bisect(
                    [g.name for g in self.spec],
                    lambda names, i=inputs, w=wanted, m=member: (
                        max(  # type: ignore[misc]
                            self.errors(i, w, _only(self.spec, m, names)).values()
                        )
                        >= self.tolerance
                    ),
                )
                return replace(report, guilty=tuple(guilty))
        return replace(report, errors=worst)

    def errors(
        self, inputs: Inputs, expected: dict[str, Tensor], permutation: Permutation
    ) -> dict[str, float]:
        try:
            actual = self.outputs(inputs, permutation)
        except Exception:
            return dict.fromkeys(expected, math.inf)
        found = {n: _relative_error(actual.get(n), t) for n, t in expected.items()}
        for name in (
            self.shared
        ):  # a tensor that shares its memory must hold what the permutation says after all writes
            if not torch.equal(self.own[name], permutation.apply_to(name, self.state[name])):
                found[f"tensor {name}"] = math.inf
        return found


def _wide(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def _relative_error(actual: Tensor | None, expected: Tensor) -> float:
    if actual is None or actual.shape != expected.shape:
        return math.inf
    if not (expected.is_floating_point() or expected.is_complex()):
        share = float((actual != expected).double().mean()) if expected.numel() else 0.0
        return share if share > _FLIPPED else 0.0
    finite = torch.isfinite(expected)
    if bool((torch.isfinite(actual) != finite).any()) or bool((actual[~finite] != expected[~finite]).any()):
        return math.inf
    actual, expected = actual[finite], expected[finite]
    return float((actual - expected).norm()) / (float(expected.norm()) or 1.0)


def _not_finite(outputs: Mapping[str, Tensor]) -> str | None:
    """An output that has NaN, or nothing but infinity."""
    for name, t in outputs.items():
        if t.numel() and (bool(t.isnan().any()) or not bool(t.isfinite().any())):
            return name
    return None


def _no_proof(outputs: Mapping[str, Tensor]) -> str:
    """Why these outputs can't prove anything; empty if they can."""
    name = _not_finite(outputs)
    if name is not None:
        return (
            f"The model's {name!r} is not finite on these inputs, so nothing is proved; give inputs that it is made"
            " for."
        )
    floating = [t for t in outputs.values() if t.is_floating_point() or t.is_complex()]
    if not any(bool((t.isfinite() & (t != 0)).any()) for t in floating):
        return (
            "Nothing was compared: the model gives no floating point number other than zero; verify a part of it that"
            " does."
        )
    return ""


def _varied(inputs: Inputs, seed: int) -> Inputs:
    """Other numbers of the same scale; whole numbers stay between the smallest and the largest, masks as they are."""
    generator = torch.Generator().manual_seed(seed)

    def vary(t: Tensor) -> Tensor:
        if not t.numel() or t.dtype == torch.bool:
            return t
        if t.is_floating_point() or t.is_complex():
            noise = torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device)
            return t + noise * (t.std(correction=0) or 1.0)
        low, high = int(t.min()), int(t.max())
        return torch.randint(low, high + 1, t.shape, generator=generator).to(t)

    return tree_map_only(Tensor, vary, inputs)


def _rebatched(inputs: Inputs, seed: int) -> Inputs:
    """Other numbers in another batch size: a sample less, or one twice, on all tensors that have the batch's size."""
    sizes = [t.shape[0] for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim]
    batch = sizes[0] if sizes else 0

    def other(t: Tensor) -> Tensor:
        if not t.ndim or t.shape[0] != batch:
            return t
        return t[: batch - 1] if batch > 1 else torch.cat([t, t])

    return _varied(tree_map_only(Tensor, other, inputs), seed)


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


def _randomise(model: nn.Module, seed: int, noise: str) -> None:
    """Matrices ~ N(0, 1 / fan_in), vectors moved by N(0, 0.3), variances in [0.5, 1.5].

    "scaled": all are multiplied by factors around one instead, for models that take roots of their parameters.
    """
    generator = torch.Generator().manual_seed(seed)

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


class _DoublePrecision(TorchDispatchMode):
    """Models that compute a norm or an angle in float32 on purpose do it in float64 here, or 1e-9 means nothing."""

    supports_higher_order_operators = True
    compiled = False  # by `torch.cond` and its like

    def __enter__(self) -> Any:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # what integers become
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        torch.set_default_dtype(self.default)
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

"""The symmetry engine: any model in, a proved `PermutationSpec` out. See docs/engine.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..arguments import outside_inference_mode
from ..errors import RebasinError, TraceError
from ..spec import PermutationSpec
from ..tensors.memory import sharing
from ..tensors.modules import changeable
from . import cache
from .build import build
from .export import compose, export
from .rules import RULES
from .solve import solve
from .verify import VerificationReport, verify
from .walk import walk

__all__ = ["VerificationReport", "compose", "trace", "verify"]


@outside_inference_mode
def trace(model: nn.Module, *args: Any, **kwargs: Any) -> PermutationSpec:
    """The permutation symmetries of `model`, derived from what it computes on these example inputs.

    Weights and inputs may be on the meta device: only shapes are used. The model is traced in evaluation mode and
    left as it was. What it asks of whole numbers and masks among the inputs (lengths, positions) is answered by those
    of the example. A permutation of the spec leaves every floating point output unchanged; what the engine can't
    express stays in place and is listed in `spec.pins`. Use `verify` to prove the result numerically, and `compose`
    to trace several modules together. Specs of models from installed packages are cached on disk by a hash of the
    architecture (`REBASIN_CACHE` sets the folder, `REBASIN_CACHE=off` turns it off).

    Raises:
        TraceError: the model can't be exported; the message names the line and what to do.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(
            f"rebasin.trace needs a torch.nn.Module, not {type(model).__name__}; wrap a function of modules with"
            f" rebasin.compose(function, name=module, ...)."
        )
    if any(nn.parameter.is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise TraceError(
            "The model has parameters without a shape; call it once on an input before tracing it."
        )
    model = changeable(model)
    key = cache.fingerprint(model, args, kwargs)
    state = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    shapes = {n: tuple(t.shape) for n, t in state.items() if t.is_floating_point()}
    # Tables that a model keeps as buffers (sinusoidal positions) are matched like weights; statistics only follow.
    statistics = ("running_mean", "running_var")
    buffers = frozenset(n for n in shapes.keys() - parameters if n.split(".")[-1] in statistics)
    valued = cache.with_values(key, args, kwargs)
    for known in (key, valued):
        cached = cache.load(known)
        if cached is not None and dict(cached.shapes) == shapes and _stands(model, cached, args, kwargs):
            return cached
    exported = export(model, args, kwargs, RULES)
    shared = sharing(state, {f"the constant {n}": t for n, t in exported.constants.items() if t is not None})
    constraints = walk(exported, state, shared)
    unread = exported.unread - {shared.aliases.get(name, name) for name in exported.read}
    spec = build(constraints, solve(constraints), shapes, buffers, shared.aliases, unread)
    cache.store(valued if exported.fixed else key, spec)
    return spec


def _stands(model: nn.Module, spec: PermutationSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a spec from the cache stands a proof, where that costs less than to trace: once in a process."""
    large = sum(p.numel() for p in model.parameters()) > 1 << 22
    if spec.hash in _proved or large or any(p.is_meta for p in model.parameters()):
        return True
    try:
        if not verify(model, spec, *args, find_guilty=False, **kwargs).passed:
            return False
    except RebasinError:
        return False
    _proved.add(spec.hash)
    return True


_proved: set[str] = set()

"""Where the neurons of a parameter's axis are while its module computes: which tensor, along which dimension.

Of torch's own modules it is known; of any other nothing is said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

Where = Literal["output", "input", "query", "key", "value"]


@dataclass(frozen=True)
class Place:
    where: Where
    dim: int
    offset: int = 0  # where the tensor begins on the axis
    size: int | None = None  # and how long it is; None: the whole axis


Places = dict[tuple[str, int], tuple[Place, ...]]
OUTPUT, INPUT = (Place("output", -1),), (Place("input", -1),)


def known_places(module: nn.Module) -> Places | None:
    """(own parameter, axis) -> where its neurons are seen; None for a module that is not torch's own."""
    for kinds, places in _KNOWN:
        if any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds):
            return places(module)
    return None


def _convolution(dims: int, transposed: bool, module: Any) -> Places:
    out, into = (Place("output", -dims),), (Place("input", -dims),)
    first, second = (into, out) if transposed else (out, into)
    return {("weight", 0): first, ("bias", 0): out} | ({("weight", 1): second} if module.groups == 1 else {})


def _channels(module: nn.Module) -> Places:
    own = ("weight", "bias", "running_mean", "running_var")
    return {(name, 0): (Place("output", 1),) for name in own}


def _normalised(module: Any) -> Places:
    return {(name, 0): OUTPUT for name in ("weight", "bias") if len(module.normalized_shape) == 1}


def _attention(module: Any) -> Places:
    e = module.embed_dim
    if module.in_proj_weight is None:  # other widths of keys and values have weights of their own
        own: Any = {
            (f"{where[0]}_proj_weight", 0): (Place(where, -1),) for where in ("query", "key", "value")
        }
        return {**own, ("out_proj.weight", 0): OUTPUT}
    inner = tuple(Place(w, -1, k * e, e) for k, w in enumerate(("query", "key", "value")))  # type: ignore[arg-type]
    return {("in_proj_weight", 0): inner, ("in_proj_bias", 0): inner, ("out_proj.weight", 0): OUTPUT}


_KNOWN: tuple[tuple[tuple[Any, ...], Callable[[Any], Places]], ...] = (
    ((nn.Linear,), lambda _: {("weight", 0): OUTPUT, ("bias", 0): OUTPUT, ("weight", 1): INPUT}),
    *(((getattr(nn, f"Conv{d}d"),), partial(_convolution, d + 1, False)) for d in (1, 2, 3)),
    *(((getattr(nn, f"ConvTranspose{d}d"),), partial(_convolution, d + 1, True)) for d in (1, 2, 3)),
    ((nn.Embedding,), lambda _: {("weight", 1): OUTPUT}),
    ((_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.PReLU), _channels),
    ((nn.LayerNorm, nn.RMSNorm), _normalised),
    ((nn.MultiheadAttention,), _attention),
)


def owner_of(parameter: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """Module and own name of a parameter; a weight that is computed from others (weight norm) counts as itself."""
    parameter = re.sub(r"(^|\.)parametrizations\.(\w+)\.original\d*$", r"\1\2", parameter)
    owner, _, leaf = parameter.rpartition(".")
    parent, _, last = owner.rpartition(".")
    if last == "out_proj" and isinstance(modules[parent], nn.MultiheadAttention):  # used, but never called
        return parent, f"out_proj.{leaf}"
    return owner, re.sub(r"^weight_(g|v|orig)$", "weight", leaf)

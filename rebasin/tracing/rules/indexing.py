"""Look-ups by index: the dimension looked into is fixed, the others keep their neurons."""

from __future__ import annotations

import torch

from ..labels import Label, combine, fix, pin
from .registry import Call, Result, Traced, pin_arguments, rule


@rule("embedding")
def embedding(call: Call) -> Result:
    weight, index = call.tensor("weight"), call.tensor("indices")
    pin(call.constraints, index.label, "is used as an index")
    table = fix(call.constraints, weight.label, [0], "is looked up by index")
    table = Label((1, table.shape[1]), table.factors)
    rows = table.drop([0]).right_align(len(call.shape))
    return Label((*index.label.shape, rows.shape[-1]), rows.factors)


@rule("index_select")
def index_select(call: Call) -> Result:
    x, dim = call.tensor("self"), call.args["dim"] % call.tensor("self").ndim
    label = fix(call.constraints, x.label, [dim], "is looked up by index")
    return label.sized({dim: call.shape[dim]})


@rule("gather take_along_dim")
def gather(call: Call) -> Result:
    x, index, dim = call.tensor("self"), call.tensor("index"), call.args["dim"]
    dim %= x.ndim
    label = fix(call.constraints, x.label, [dim], "is looked up by index")
    return combine(call.constraints, [label.sized({dim: 1}), Label(index.shape, index.label.factors)])


@rule("index")
def index(call: Call) -> Result:
    """x[i, :, j, ...]: indexed dimensions are replaced by those of the broadcast indices."""
    x, indices = call.tensor("self"), list(call.args["indices"])
    used = [d for d, i in enumerate(indices) if isinstance(i, Traced)]
    for d in used:
        pin(call.constraints, indices[d].label, "is used as an index")
    label = fix(call.constraints, x.label, used, "is looked up by index")
    if any(indices[d].value is not None and indices[d].value.dtype.is_floating_point for d in used):
        pin(call.constraints, label, "is used as an index")
        return Label(call.shape)
    # Dimensions that the indices bring (a mask covers several).
    width = len(call.shape) - (x.ndim - len(used))
    adjacent = used == list(range(used[0], used[-1] + 1))
    if any(indices[d].ndim and _is_mask(indices[d]) for d in used) or width < 0:
        pin(call.constraints, label, "is looked up by a mask")
        return Label(call.shape)
    at = used[0] if adjacent else 0
    kept = label.drop(used)
    places = range(at, at + width)
    return kept.expand_rank(places).sized({d: call.shape[d] for d in places})


def _is_mask(traced: Traced) -> bool:
    return traced.value is not None and traced.value.dtype == torch.bool


@rule(
    "index_put scatter scatter_add scatter_reduce index_add index_copy masked_scatter select_scatter"
    " slice_scatter"
)
def write(call: Call) -> Result:
    """Writing into part of a tensor: with neurons on other dimensions only, it is elementwise there; else fixed."""
    x = call.tensor("self")
    source = next(
        (call.args[n] for n in ("src", "source", "values") if isinstance(call.args.get(n), Traced)), None
    )
    if call.name in ("select_scatter", "slice_scatter") and source is not None:
        dim = call.args["dim"] % x.ndim
        label = fix(call.constraints, x.label, [dim], "is written into in part")
        piece = source.label.expand_rank([dim]) if call.name == "select_scatter" else source.label
        piece = fix(call.constraints, piece, [dim], "is written into a part")
        joined = combine(call.constraints, [label.sized({dim: 1}), piece.sized({dim: 1})])
        return joined.sized({dim: call.shape[dim]})
    pin_arguments(call, "is written by index")
    return Label(call.shape)

"""Look-ups by index: the dimension looked into is fixed, the others keep their neurons."""

from __future__ import annotations

import numpy as np
import torch

from ..labels import Label, combine, fix, take
from .registry import Call, Result, Traced, Unsupported, rule
from .shapes import concatenate


@rule("embedding", takes="weight", index="indices", maps="values")
def embedding(call: Call) -> Result:
    index = call.tensor("indices")
    table = fix(call.constraints, call.tensor("weight").label, [0], "is looked up by index")
    rows = table.drop([0]).right_align(len(call.shape))
    return Label((*index.label.shape, rows.shape[-1]), rows.factors)


@rule("index_select", takes="self dim", index="index", maps="values")
def index_select(call: Call) -> Result:
    x, dim = call.tensor("self"), call.args["dim"] % call.tensor("self").ndim
    label = fix(call.constraints, x.label, [dim], "is looked up by index")
    return label.sized({dim: call.shape[dim]})


@rule("gather take_along_dim", takes="self dim index indices")
def gather(call: Call) -> Result:
    """y[i, c] = x[index[i, c], c]: the dimension looked into is fixed, on the others both move together."""
    c, x, dim = call.constraints, call.tensor("self"), call.args["dim"]
    index = call.tensor("index" if call.name == "gather" else "indices")
    if dim is None or index.ndim != x.ndim or not x.ndim:
        raise Unsupported("is looked up by index")
    dim %= x.ndim
    label = fix(c, x.label, [dim], "is looked up by index").sized({dim: 1})
    if call.name == "gather":  # the index may be smaller: the rest of x is not read
        for d in range(x.ndim):
            if d != dim and index.shape[d] < x.shape[d]:
                label = take(c, label, d, np.arange(index.shape[d]), 0)
    return combine(c, [label, Label(index.label.shape, index.label.factors)])


@rule("index", takes="self", index="indices", maps="values")
def index(call: Call) -> Result:
    """x[i, :, j, ...]: indexed dimensions are replaced by those of the broadcast indices."""
    x, indices = call.tensor("self"), list(call.args["indices"])
    used = [d for d, i in enumerate(indices) if isinstance(i, Traced)]
    width = len(call.shape) - (x.ndim - len(used))  # dimensions that the indices bring
    if any(indices[d].dtype in (torch.bool, torch.uint8) for d in used) or width < 0:
        raise Unsupported("is looked up by a mask")
    label = fix(call.constraints, x.label, used, "is looked up by index")
    adjacent = used == list(range(used[0], used[-1] + 1))
    at = used[0] if adjacent else 0
    places = range(at, at + width)
    return label.drop(used).expand_rank(places).sized({d: call.shape[d] for d in places})


@rule("index_put", takes="self values accumulate", index="indices", maps="values")
def write_at(call: Call) -> Result:
    """x[i, :, j, ...] = v: `index` turned round. The places are fixed, on the others x and v move together."""
    x, values, indices = call.tensor("self"), call.tensor("values"), list(call.args["indices"])
    used = [d for d, i in enumerate(indices) if isinstance(i, Traced)]
    if not used or any(indices[d].dtype in (torch.bool, torch.uint8) for d in used):
        raise Unsupported("is written by a mask")
    width = max(indices[d].ndim for d in used)
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    places = range(at, at + width)
    label = values.label.right_align(x.ndim - len(used) + width)
    label = fix(call.constraints, label, places, "is written by index").drop(places).expand_rank(used)
    return _written(call, label, used, bool(call.args.get("accumulate")))


@rule("index_copy index_add", takes="self dim source alpha", index="index", maps="values")
def write_along(call: Call) -> Result:
    """y[index[i], c] = source[i, c], or added to it."""
    dim = call.args["dim"] % call.tensor("self").ndim
    label = fix(call.constraints, call.tensor("source").label, [dim], "is written by index").sized({dim: 1})
    return _written(call, label, [dim], call.name == "index_add")


def _written(call: Call, values: Label, dims: list[int], added: bool) -> Label:
    """Values without extent along `dims`, written or added somewhere along them."""
    x = fix(call.constraints, call.tensor("self").label, dims, "is written by index").sized(
        dict.fromkeys(dims, 1)
    )
    label = combine(call.constraints, [x, values], "sum" if added else "join")
    return label.sized({d: call.shape[d] for d in dims})


@rule("scatter_add", takes="self src dim index")
def scatter(call: Call) -> Result:
    """y[index[i, c], c] += src[i, c]: as in `gather`, the dimension is fixed and on the others all move together."""
    c, x, index, source = call.constraints, call.tensor("self"), call.tensor("index"), call.tensor("src")
    if not x.ndim or not x.ndim == index.ndim == source.ndim:
        raise Unsupported("is written by index")
    dim = call.args["dim"] % x.ndim
    if any(len({t.shape[d] for t in (x, index, source)}) > 1 for d in range(x.ndim) if d != dim):
        raise Unsupported("is written by index in part")
    labels = [fix(c, t.label, [dim], "is written by index").sized({dim: 1}) for t in (x, source, index)]
    return combine(c, labels).sized({dim: x.shape[dim]})


@rule(
    "scatter scatter_reduce masked_scatter",
    takes="self src dim index",
    refuses="source mask value reduce",
)
def write(call: Call) -> Result:
    raise Unsupported("is written by index")


@rule("slice_scatter select_scatter", takes="self src dim start end step index")
def write_part(call: Call) -> Result:
    """Writing into part of a tensor: what is left of it and the part are joined, and put in their order."""
    c, x, label = call.constraints, call.tensor("self"), call.tensor("src").label
    dim = call.args["dim"] % x.ndim
    size = x.shape[dim]
    if call.name == "select_scatter":
        label, part = label.expand_rank([dim]), np.array([call.args["index"] % size])
    else:
        bounds = slice(call.args.get("start"), call.args.get("end"), call.args.get("step", 1))
        part = np.arange(size)[bounds]
    if len(part) == size:
        return label
    rest = np.setdiff1d(np.arange(size), part)
    sizes = [(*x.shape[:dim], len(index), *x.shape[dim + 1 :]) for index in (rest, part)]
    joined = concatenate(c, [take(c, x.label, dim, rest, 0), label], sizes, dim)
    return take(c, joined, dim, np.argsort(np.concatenate([rest, part])), None)

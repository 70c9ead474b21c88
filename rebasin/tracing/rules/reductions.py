"""Sums, means, norms and extrema: over all neurons of a factor they are invariant, over some they make sets."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..constraints import Limit
from ..labels import Label, combine, contract, covered, fix, normalise
from .elementwise import pointwise
from .registry import Call, Result, hold, rule


def dimensions(value: Any, ndim: int) -> list[int]:
    if value is None or value == []:
        return list(range(ndim))
    return [d % ndim for d in ([value] if isinstance(value, int) else value)] if ndim else []


@rule(
    "sum mean amax amin prod std var logsumexp norm linalg_vector_norm nansum all any median max min"
    " var_mean std_mean",
    takes="self other dim keepdim",
    every_output=True,
    maps="squares",
)
def reduction(call: Call) -> Result:
    x = call.tensor("self")
    if call.optional("other") is not None:  # max(a, b) of two tensors
        hold(call, "goes through a function")
        return pointwise(call)
    dims = dimensions(call.args.get("dim"), x.ndim)
    keep = bool(call.args.get("keepdim"))
    c, label = call.constraints, x.label
    contracted = contract(c, label, dims, keep, kept=_kept(call, dims))
    # max over dim gives indices, too: they name positions, so the neurons searched through may not move.
    if isinstance(call.out, list | tuple) and call.name in ("max", "min", "median"):
        contracted = contract(c, fix(c, label, dims, "is searched for a position"), dims, keep)
        return [contracted, _places(call, contracted)]
    return [contracted] * len(call.outputs)


def _places(call: Call, label: Label) -> Label:
    """Positions, one for each neuron: they are exchanged with the neurons, and no map changes them."""
    c, own = call.constraints, []
    for factor in label.factors:
        places = c.fresh(np.zeros(factor.shape, dtype=np.int64))
        c.tie(factor, places, linked=False)
        c.limit(places, Limit.FIXED, "are positions")
        own.append(places)
    return Label(label.shape, tuple(own))


def _kept(call: Call, dims: list[int]) -> Limit:
    """The linear maps of what is summed over that leave this reduction as it is."""
    label, order = call.tensor("self").label, call.args.get("p", call.args.get("ord", 2))
    untouched = [f for f in label.factors if not any(d in dims for d in covered(f))]
    if call.name in ("sum", "mean", "nansum") and not label.squares:
        return Limit.ISOMETRY | Limit.ONES  # what is not summed over moves as it did
    extremum = call.name in ("amax", "amin", "max", "min") and not label.squares
    for factor in untouched:
        what = Limit.APART | Limit.POSITIVE if extremum else Limit.FIXED
        call.constraints.limit(
            factor, what, "goes through an extremum" if extremum else "goes through a function"
        )
    if label.squares:
        return Limit.ISOMETRY if call.name in ("sum", "mean") else Limit.FIXED
    if call.name in ("norm", "linalg_vector_norm"):
        return Limit.ISOMETRY if order in (None, 2) else Limit.FIXED
    if call.name in ("std", "var", "var_mean", "std_mean"):
        return Limit.ISOMETRY | Limit.ONES
    return Limit.FIXED


@rule(
    "argmax argmin topk sort argsort cumprod kthvalue cummax diff unfold",
    takes="self dim dimension keepdim",
    refuses="prepend append",
    every_output=True,
)
def positional(call: Call) -> Result:
    x = call.tensor("self")
    name = "dim" if "dim" in call.args else "dimension"
    dims = dimensions(call.args.get(name), x.ndim)
    label = fix(call.constraints, x.label, dims, "depends on the order of its values")
    outs = call.outputs
    if any(len(o.shape) != x.ndim for o in outs):
        if call.name == "unfold":
            label = label.expand_rank([label.ndim])
            label = Label(tuple(outs[0].shape), label.factors)
        else:
            label = label.drop(dims)
    else:
        label = Label(
            tuple(
                o if s > 1 or d in dims else 1
                for d, (o, s) in enumerate(zip(outs[0].shape, label.shape, strict=True))
            ),
            label.factors,
        )
    return [label] * len(outs)


rule("cumsum", takes="self dim", every_output=True, maps="values")(
    positional
)  # linear in all that it does not sum


@rule("softmax log_softmax _softmax _log_softmax", takes="self dim")
def softmax(call: Call) -> Result:
    return normalise(
        call.constraints, call.tensor("self").label, dimensions(call.args["dim"], call.tensor("self").ndim)
    )


@rule("cosine_similarity", takes="x1 x2 dim")
def cosine(call: Call) -> Result:
    both = combine(call.constraints, [call.tensor("x1").label, call.tensor("x2").label])
    return contract(call.constraints, both, dimensions(call.args["dim"], both.ndim))

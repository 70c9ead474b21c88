"""Pointwise operators: equivariant; operands are tied where their neurons meet.

Linear maps commute with sums, products and with what only moves or converts values; positive scales with functions that
are homogeneous, signs with odd ones.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ..constraints import Gain, Limit
from ..labels import Label, combine
from .registry import Call, Result, Rule, Traced, hold, labels_of, pin_all, rule


def pointwise(call: Call) -> Result:
    """Any operator that computes each output value from the values at the same (broadcast) position."""
    operands = [t.label for t in labels_of(list(call.args.values()))]
    label = combine(call.constraints, operands) if operands else Label((1,) * len(call.outputs[0].shape))
    return [label] * len(call.outputs)


def tagged(target: torch._ops.OpOverload) -> Rule | None:
    """The rule of an operator that PyTorch tags as pointwise: all its tensors and numbers are operands."""
    if torch.Tag.pointwise not in target.tags:
        return None
    operands = (
        a.name for a in target._schema.arguments if not str(a.type).startswith(("List", "Optional[List"))
    )
    return Rule(pointwise, frozenset(operands), *[frozenset[str]()] * 3, every_output=True, maps="")


# Pointwise in effect, though PyTorch does not tag them so.
rule(
    "positive polar complex fill relu6"
    " hardtanh rrelu logical_not nan_to_num float_power true_divide square conj celu"
    " selu hardswish hardsigmoid mish silu gelu elu leaky_relu softplus log_sigmoid threshold"
    " addcmul addcdiv lerp copy",
    takes="self value tensor1 tensor2 end weight src exponent abs angle real imag",
    refuses="training generator",
    every_output=True,
)(pointwise)


@rule(
    "clone contiguous to _to_copy detach detach_ alias lift_fresh_copy lift_fresh type_as dropout feature_dropout"
    " native_dropout",
    takes="self input other",
    refuses="train",  # dropout that draws random numbers: each has its position
    every_output=True,
    maps="squares",
    gains=True,
)
def same(call: Call) -> Result:
    """The same values in another place or type."""
    x = next(call.args[n] for n in ("self", "input") if isinstance(call.args.get(n), Traced))
    made = call.outputs[0].dtype
    # Half precision is the rounding of all computing; what is rounded to fewer bits on purpose is a function.
    if not x.dtype.is_floating_point or not made.is_floating_point or made.itemsize < 2:
        return _function(call)
    return x.label


@rule("add sub rsub subtract", takes="self other alpha", maps="values", gains=True)
def add(call: Call) -> Result:
    x, y = call.args["self"], call.args["other"]
    if isinstance(x, Traced) and isinstance(y, Traced):
        return combine(call.constraints, [x.label, y.label], "sum")
    (x, number) = (x, y) if isinstance(x, Traced) else (y, x)
    result = combine(call.constraints, [x.label, Label((1,) * x.ndim)], "sum")
    if x.label.gain and call.name == "add" and isinstance(number, int | float):
        offset = x.label.gain.offset + number * call.args.get("alpha", 1)
        return replace(result, gain=Gain(x.label.gain.parameter, offset))
    return result


@rule("mul multiply div divide true_divide", takes="self other", maps="values")
def multiply(call: Call) -> Result:
    c = call.constraints
    x, y = call.args["self"], call.args["other"]
    if not (isinstance(x, Traced) and isinstance(y, Traced)):  # a number
        if call.args.get("rounding_mode") or (not isinstance(x, Traced) and "div" in call.name):
            return _function(call)
        x = x if isinstance(x, Traced) else y
        return combine(c, [x.label], "product")
    if "div" in call.name:
        if call.args.get("rounding_mode"):
            return _function(call)
        for factor in y.label.factors:
            c.limit(factor, Limit.FIXED, "is divided by")
        return combine(c, [x.label, replace(y.label, gain=None)], "product")
    mine, others = x.label.factors, y.label.factors
    alike = x.shape == y.shape and x.label.shape == y.label.shape and len(mine) == len(others)
    if alike and all(map(np.array_equal, mine, others)):
        return _squared(call)
    return combine(c, [x.label, y.label], "product")


@rule("neg negative", takes="self", maps="values")
def negate(call: Call) -> Result:
    return combine(call.constraints, [call.tensor("self").label], "product")


@rule("pow square", takes="self exponent", maps="values")
def power(call: Call) -> Result:
    exponent = call.args.get("exponent", 2)
    if isinstance(call.args["self"], Traced) and not isinstance(exponent, Traced) and exponent == 2:
        return _squared(call)
    return _function(call)


def _squared(call: Call) -> Label:
    """Only sums over all of a factor are known to linear maps: inner products."""
    c, x = call.constraints, call.tensor("self").label
    label = combine(c, [x, x], "product") if not x.factors else x
    return Label(label.shape, label.factors, squares=bool(x.factors))


@rule("relu relu_ leaky_relu leaky_relu_ threshold", takes="self", maps="values")
def homogeneous(call: Call) -> Result:
    if call.name == "threshold" and (call.args["threshold"] or call.args["value"]):
        return _function(call)
    return _limited(call, Limit.APART | Limit.POSITIVE, "is cut at zero")


@rule("clamp clamp_min clip", takes="self min max", maps="values")
def clamped(call: Call) -> Result:
    if (
        isinstance(call.args.get("min"), Traced)
        or call.args.get("min") != 0
        or call.args.get("max") is not None
    ):
        return _function(call)
    return homogeneous(call)


@rule("abs absolute", takes="self", maps="values")
def absolute(call: Call) -> Result:
    return _limited(call, Limit.APART | Limit.POSITIVE, "loses its sign")


def _is_zero(value: object) -> bool:
    if isinstance(value, Traced):
        return value.value is not None and not bool(value.value.any())
    return isinstance(value, int | float) and value == 0


@rule("masked_fill", takes="self mask value", maps="values")
def masked(call: Call) -> Result:
    """Filled with zeros it is a product with what is kept: a mask alike for all neurons lets all maps through."""
    if not _is_zero(call.args["value"]):
        return _function(call)
    return combine(call.constraints, [call.tensor("self").label, call.tensor("mask").label], "product")


@rule("where", takes="condition self other", maps="values")
def chosen(call: Call) -> Result:
    """condition * self + (1 - condition) * other."""
    c, condition = call.constraints, call.tensor("condition").label
    sides = [value for value in (call.args["self"], call.args["other"]) if not _is_zero(value)]
    if not all(isinstance(side, Traced) for side in sides):  # a number that is not zero
        return _function(call)
    parts = [combine(c, [side.label, condition], "product") for side in sides]
    return combine(c, parts, "sum") if parts else Label((1,) * len(call.shape))


@rule("tanh sin asinh atan erf sinh", takes="self", maps="values")
def odd(call: Call) -> Result:
    return _limited(call, Limit.APART | Limit.ISOMETRY, "goes through an odd function")


def _limited(call: Call, what: Limit, why: str) -> Label:
    x = call.tensor("self").label
    for factor in x.factors:
        call.constraints.limit(factor, what, why)
    return replace(x, gain=None)


def _function(call: Call) -> Result:
    hold(call, "goes through a function")
    return pointwise(call)


@rule("prelu _prelu_kernel", takes="self weight", maps="values")
def prelu(call: Call) -> Result:
    x, weight = call.tensor("self"), call.tensor("weight").label
    _limited(call, Limit.APART | Limit.POSITIVE, "is cut at zero")
    for factor in weight.factors:
        call.constraints.limit(factor, Limit.FIXED, "is a slope")
    if call.name == "prelu" and weight.ndim == 1 and x.ndim > 1:  # one slope for each channel, dimension 1
        weight = weight.expand_rank(range(1, x.ndim - 1)).right_align(x.ndim)
    return combine(call.constraints, [x.label, weight], "product")


@rule(
    "zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor empty"
    " empty_like new_empty",
    shape_of="self",
    takes="",
)
def constant(call: Call) -> Result:
    return Label((1,) * len(call.shape))  # the same value everywhere: it has no place to be moved from


@rule(
    "arange linspace eye tril triu rand randn rand_like randn_like randint bernoulli one_hot"
    " tril_indices triu_indices meshgrid cartesian_prod",
    takes="self tensors start end p",
    refuses="generator indexing",
    every_output=True,
)
def varying(call: Call) -> Result:
    pin_all(call, "goes through an operator that knows positions")
    return call.plain

"""Pointwise operators: equivariant; operands are tied where their neurons meet."""

from __future__ import annotations

import torch

from ..labels import Label, combine
from .registry import Call, Result, Rule, labels_of, pin_all, rule


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
    return Rule(pointwise, frozenset(operands), *[frozenset[str]()] * 3, every_output=True)


# Pointwise in effect, though PyTorch does not tag them so.
rule(
    "clone contiguous to _to_copy detach detach_ alias lift_fresh_copy lift_fresh dropout"
    " feature_dropout native_dropout positive polar complex fill masked_fill where relu6"
    " hardtanh rrelu logical_not nan_to_num float_power true_divide square conj celu"
    " selu hardswish hardsigmoid mish silu gelu elu leaky_relu softplus log_sigmoid threshold clip clamp"
    " multiply subtract divide addcmul addcdiv lerp copy type_as",
    takes="self input other value mask condition tensor1 tensor2 end weight src min max exponent abs angle real imag",
    refuses="train training generator",  # dropout that draws random numbers: each has its position
    every_output=True,
)(pointwise)


@rule("prelu _prelu_kernel", takes="self weight")
def prelu(call: Call) -> Result:
    x, weight = call.tensor("self"), call.tensor("weight").label
    if call.name == "prelu" and weight.ndim == 1 and x.ndim > 1:  # one slope for each channel, dimension 1
        weight = weight.expand_rank(range(1, x.ndim - 1)).right_align(x.ndim)
    return combine(call.constraints, [x.label, weight])


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

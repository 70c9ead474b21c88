"""Pointwise operators: equivariant; operands are tied where their neurons meet."""

from __future__ import annotations

from ..labels import Label, combine
from .registry import Call, Result, labels_of, pin_arguments, rule


def pointwise(call: Call) -> Result:
    """Any operator that computes each output value from the values at the same (broadcast) position."""
    operands = [t.label for t in labels_of(list(call.args.values()))]
    if not operands:
        return Label(call.shape)
    return combine(call.constraints, operands)


# Pointwise in effect, though PyTorch does not tag them so. Dropout is off (evaluation mode).
rule(
    "clone contiguous to _to_copy detach detach_ alias lift_fresh_copy lift_fresh dropout"
    " feature_dropout native_dropout type_as positive polar complex fill masked_fill where relu6"
    " hardtanh rrelu logical_not nan_to_num float_power true_divide square conj view_as_real_copy celu"
    " selu hardswish hardsigmoid mish silu gelu elu leaky_relu softplus log_sigmoid threshold clip clamp"
    " multiply subtract divide addcmul addcdiv lerp copy"
)(pointwise)


@rule("prelu _prelu_kernel")
def prelu(call: Call) -> Result:
    x, weight = call.tensor("self"), call.tensor("weight").label
    if call.name == "prelu" and weight.ndim == 1 and x.ndim > 1:  # one slope for each channel, dimension 1
        weight = weight.expand_rank(range(1, x.ndim - 1)).right_align(x.ndim)
    return combine(call.constraints, [x.label, weight])


@rule(
    "zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor empty"
    " empty_like new_empty"
)
def constant(call: Call) -> Result:
    return Label((1,) * len(call.shape))  # the same value everywhere: it has no place to be moved from


@rule(
    "arange linspace eye tril triu rand randn rand_like randn_like randint bernoulli one_hot sym_size"
    " tril_indices triu_indices meshgrid cartesian_prod"
)
def varying(call: Call) -> Result:
    pin_arguments(call, "goes through an operator that knows positions")
    return call.labelled([Label(tuple(o.shape)) for o in call.outputs])

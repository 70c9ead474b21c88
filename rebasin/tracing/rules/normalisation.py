"""Normalisations: what is averaged together is a set; scale, shift and running statistics are tied to their neurons.

To linear maps a norm without scale and shift is a function that commutes with those that keep what it averages:
LayerNorm and GroupNorm with rotations that keep the ones (of a group), RMSNorm with all rotations. Scale and shift are
a product and a sum.
"""

from __future__ import annotations

from ..constraints import Constraints, Limit
from ..labels import Label, combine, contract, normalise, reshape
from .registry import Call, Result, rule

CENTRED = Limit.ISOMETRY | Limit.ONES


def _affine(call: Call, x: Label, scale: Label | None, shift: Label | None) -> Label:
    """x * scale + shift, broadcast from the right."""
    x = combine(call.constraints, [x, scale], "product") if scale is not None else x
    return combine(call.constraints, [x, shift], "sum") if shift is not None else x


def _channels(call: Call, name: str, ndim: int) -> Label | None:
    """A tensor for each channel [C], laid out beside [N, C, *space]."""
    given = call.optional(name)
    return None if given is None else given.label.expand_rank(range(1, ndim - 1))


@rule(
    "batch_norm _native_batch_norm_legit_no_training native_batch_norm _native_batch_norm_legit"
    " cudnn_batch_norm instance_norm",
    takes="input weight bias running_mean running_var training use_input_stats",
    maps="values",
)
def batch_norm(call: Call) -> Result:
    c, x = call.constraints, call.tensor("input").label
    if call.name == "instance_norm" or call.args.get("training"):
        contract(c, x, [0, *range(2, x.ndim)] if call.name != "instance_norm" else range(2, x.ndim))
    statistics = [_channels(call, name, x.ndim) for name in ("running_mean", "running_var")]
    for label in (x, *(s for s in statistics if s is not None)):
        for factor in label.factors:
            c.limit(factor, Limit.FIXED, "is brought to unit variance")
    x = combine(c, [x, *(s for s in statistics if s is not None)], "sum")
    return _affine(call, x, _channels(call, "weight", x.ndim), _channels(call, "bias", x.ndim))


def group_sets(c: Constraints, x: Label, groups: int, channels: int) -> None:
    """Each of the `groups` runs of channels becomes a set: a legal permutation maps runs to runs."""
    flat = Label(x.shape, tuple(x.factors))
    new = (x.shape[0], groups, channels // groups, *x.shape[2:])
    split = reshape(c, flat, (x.shape[0], channels, *x.shape[2:]), new)
    normalise(c, split, range(2, split.ndim), CENTRED)


@rule(
    "group_norm native_group_norm",
    takes="input weight bias num_groups group",
    maps="values",
)
def group_norm(call: Call) -> Result:
    x = call.tensor("input")
    groups = int(call.args["num_groups"] if "num_groups" in call.args else call.args["group"])
    group_sets(call.constraints, x.label, groups, x.shape[1])
    return _affine(call, x.label, _channels(call, "weight", x.ndim), _channels(call, "bias", x.ndim))


@rule(
    "layer_norm native_layer_norm rms_norm _fused_rms_norm",
    takes="input weight bias normalized_shape",
    maps="values",
)
def layer_norm(call: Call) -> Result:
    x = call.tensor("input").label
    dims = len(call.args["normalized_shape"])
    kept = Limit.ISOMETRY if "rms" in call.name else CENTRED
    normalise(call.constraints, x, range(x.ndim - dims, x.ndim), kept)
    weight, bias = call.optional("weight"), call.optional("bias")
    return _affine(call, x, weight and weight.label, bias and bias.label)


@rule("_weight_norm _weight_norm_interface", takes="v g dim")
def weight_norm(call: Call) -> Result:
    """v / |v| * g, the norm taken over all dimensions but `dim`."""
    v, dim = call.tensor("v").label, call.args["dim"]  # -1: over all of them
    normalise(call.constraints, v, [d for d in range(v.ndim) if d != dim])
    return combine(call.constraints, [v, call.tensor("g").label])

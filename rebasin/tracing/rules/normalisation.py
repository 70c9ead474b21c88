"""Normalisations: what is averaged together is a set; scale, shift and running statistics are tied to their neurons."""

from __future__ import annotations

from ..constraints import Constraints
from ..labels import Label, combine, contract, normalise, reshape
from .registry import Call, Result, rule


def _channelwise(call: Call, x: Label, names: tuple[str, ...]) -> Label:
    """`x` [N, C, *space] together with per-channel tensors [C]."""
    others = [call.optional(name) for name in names]
    aligned = [t.label.expand_rank(range(1, x.ndim - 1)) for t in others if t is not None]
    return combine(call.constraints, [x, *aligned])


@rule(
    "batch_norm _native_batch_norm_legit_no_training native_batch_norm _native_batch_norm_legit"
    " cudnn_batch_norm instance_norm",
    takes="input weight bias running_mean running_var training use_input_stats",
)
def batch_norm(call: Call) -> Result:
    x = call.tensor("input").label
    if call.name == "instance_norm" or call.args.get("training"):
        contract(
            call.constraints, x, [0, *range(2, x.ndim)] if call.name != "instance_norm" else range(2, x.ndim)
        )
    return _channelwise(call, x, ("weight", "bias", "running_mean", "running_var"))


def group_sets(c: Constraints, x: Label, groups: int, channels: int) -> None:
    """Each of the `groups` runs of channels becomes a set: a legal permutation maps runs to runs."""
    flat = Label(x.shape, tuple(x.factors))
    new = (x.shape[0], groups, channels // groups, *x.shape[2:])
    split = reshape(c, flat, (x.shape[0], channels, *x.shape[2:]), new)
    contract(c, split, range(2, split.ndim))


@rule("group_norm native_group_norm", takes="input weight bias num_groups group")
def group_norm(call: Call) -> Result:
    x = call.tensor("input")
    groups = int(call.args["num_groups"] if "num_groups" in call.args else call.args["group"])
    group_sets(call.constraints, x.label, groups, x.shape[1])
    return _channelwise(call, x.label, ("weight", "bias"))


@rule("layer_norm native_layer_norm rms_norm _fused_rms_norm", takes="input weight bias normalized_shape")
def layer_norm(call: Call) -> Result:
    x = call.tensor("input").label
    dims = len(call.args["normalized_shape"])
    normalise(call.constraints, x, range(x.ndim - dims, x.ndim))
    affine = [t.label for t in (call.optional("weight"), call.optional("bias")) if t is not None]
    return combine(call.constraints, [x, *affine])


@rule("_weight_norm _weight_norm_interface", takes="v g dim")
def weight_norm(call: Call) -> Result:
    """v / |v| * g, the norm taken over all dimensions but `dim`."""
    v, dim = call.tensor("v").label, call.args["dim"]  # -1: over all of them
    normalise(call.constraints, v, [d for d in range(v.ndim) if d != dim])
    return combine(call.constraints, [v, call.tensor("g").label])

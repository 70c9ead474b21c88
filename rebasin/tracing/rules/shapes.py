"""Operators that move data without computing: the label moves exactly as the data does."""

from __future__ import annotations

import numpy as np

from ..constraints import Constraints, Limit
from ..labels import Label, combine, covered, distinct, fix, flat_index, pin, reshape, take
from .registry import Call, Result, Traced, Unsupported, hold, rule


@rule(
    "view reshape _unsafe_view flatten unflatten view_as reshape_as ravel view_copy _reshape_alias"
    " squeeze unsqueeze atleast_1d atleast_2d atleast_3d squeeze_copy unsqueeze_copy",
    takes="self dim",
    shape_of="other",
    refuses="tensors",
    maps="values",
    gains=True,
)
def view(call: Call) -> Result:
    x = call.tensor("self")
    if call.args.get("dtype") is not None:
        raise Unsupported("is read as numbers of another type")
    if call.name.startswith("unsqueeze"):
        return x.label.expand_rank([call.args["dim"] % (x.ndim + 1)])
    if call.name.startswith("squeeze"):
        dims = call.args.get("dim")
        dims = range(x.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
        return x.label.drop([d % x.ndim for d in dims if x.shape[d % x.ndim] == 1])
    return reshape(call.constraints, x.label, x.shape, call.shape)


@rule(
    "permute transpose t numpy_T swapaxes swapdims movedim moveaxis permute_copy mT adjoint"
    " transpose_copy matrix_H",
    takes="self dims source destination dim0 dim1 axis0 axis1",
    maps="values",
    gains=True,
)
def permute(call: Call) -> Result:
    x, args = call.tensor("self"), call.args
    axes = np.empty(range(x.ndim))  # it has no values, and each axis has its number as size
    if "dims" in args:
        axes = axes.transpose(args["dims"])
    elif "source" in args:
        axes = np.moveaxis(axes, args["source"], args["destination"])
    elif call.name in ("t", "numpy_T"):
        axes = axes.T
    else:
        axes = axes.swapaxes(*(args.get(f"dim{k}", args.get(f"axis{k}", k - 2)) for k in (0, 1)))
    return x.label.permute(axes.shape)


@rule("expand expand_as broadcast_to expand_copy", shape_of="other", maps="squares", gains=True)
def expand(call: Call) -> Result:
    return call.tensor("self").label.right_align(len(call.shape))  # the new dimensions are uniform


@rule("repeat tile", takes="self dims", maps="values")
def repeat(call: Call) -> Result:
    """repeat(r) is [r, n] reshaped to [r n] in each dimension."""
    x = call.tensor("self")
    label, ndim = x.label.right_align(len(call.shape)), len(call.shape)
    sizes = [1] * (ndim - x.ndim) + list(x.shape)
    times = [o // s for o, s in zip(call.shape, sizes, strict=True)]
    wide = label.expand_rank(range(0, 2 * ndim, 2))
    old = [n for pair in zip(times, sizes, strict=True) for n in pair]
    return reshape(call.constraints, wide, old, call.shape)


@rule("repeat_interleave", takes="self repeats dim", maps="values")
def repeat_interleave(call: Call) -> Result:
    x = call.tensor("self")
    times, dim = call.args["repeats"], call.args.get("dim")
    if dim is None:
        raise Unsupported("is repeated without a dimension")
    dim %= x.ndim
    if isinstance(times, Traced):  # a look-up: each place has its own count
        pin(call.constraints, times.label, "is used as a count")
        label = fix(call.constraints, x.label, [dim], "is repeated by a tensor of counts")
        return label.sized({dim: call.shape[dim]})
    if not isinstance(times, int):
        raise Unsupported("is repeated by something that is no number")
    wide = x.label.expand_rank([dim + 1])
    old = [*x.shape[: dim + 1], times, *x.shape[dim + 1 :]]
    return reshape(call.constraints, wide, old, call.shape)


@rule("cat concat concatenate stack hstack vstack dstack column_stack", takes="tensors dim", maps="values")
def cat(call: Call) -> Result:
    tensors: list[Traced] = [t for t in call.args["tensors"] if t.shape != (0,)]
    labels, shapes = [t.label for t in tensors], [t.shape for t in tensors]
    dim = call.args.get("dim", 0) % len(call.shape)
    if call.name in ("hstack", "vstack", "dstack", "column_stack"):
        if call.name == "dstack" or any(len(s) < 2 for s in shapes):
            raise Unsupported("is stacked")
        dim = 0 if call.name == "vstack" else 1
    if call.name == "stack":
        labels = [label.expand_rank([dim]) for label in labels]
        shapes = [(*s[:dim], 1, *s[dim:]) for s in shapes]
    return concatenate(call.constraints, labels, shapes, dim)


def concatenate(c: Constraints, labels: list[Label], shapes: list[tuple[int, ...]], dim: int) -> Label:
    """Along `dim`; on the other dimensions the operands' neurons are tied, as in an elementwise operator."""
    if len(labels) == 1:
        return labels[0]
    along = [label.factor_on(dim) for label in labels]
    if all(f is None for f in along):  # the pieces lie next to each other along a plain dimension
        joined = combine(c, [x.sized({dim: 1}) for x in labels], "join")
        return joined.sized({dim: sum(s[dim] for s in shapes)})
    # Some operands have neurons along dim, perhaps on further dimensions too (heads): bring all to the same ones.
    dims = sorted({d for f in along if f is not None for d in covered(f)} | {dim})
    rest = [Label(x.shape, tuple(f for f in x.factors if f.shape[dim] == 1)) for x in labels]
    dims = _closure(dims, rest)
    extent = [max(x.shape[d] for x in labels) for d in range(labels[0].ndim)]
    parts, roles = [], []
    for number, (label, shape) in enumerate(zip(labels, shapes, strict=True)):
        size = [shape[dim] if d == dim else extent[d] if d in dims else 1 for d in range(label.ndim)]
        mine = [f for f in label.factors if any(d in dims for d in covered(f))]
        part = next((f for f in mine if list(f.shape) == size), None)
        if part is None:
            part = c.helpers_of(size)
            for f in mine:
                c.member(part, f)
                c.limit(f, Limit.FIXED, "is concatenated with neurons of other dimensions")
            fixed = [d for d in dims if shape[d] > 1 and not any(f.shape[d] > 1 for f in mine)]
            fixed = [d for d in fixed if label.shape[d] > 1]  # not of constants: they are alike
            if fixed:
                c.mark(part, flat_index(size, fixed), "is concatenated with neurons, but has none")
        parts.append(part)
        roles.append(np.full(size, number))
    whole = distinct(c, np.concatenate(parts, axis=dim), np.concatenate(roles, axis=dim))
    elsewhere = [tuple(f for f in x.factors if not any(d in dims for d in covered(f))) for x in labels]
    others = [Label(x.shape, f).sized(dict.fromkeys(dims, 1)) for x, f in zip(labels, elsewhere, strict=True)]
    extent[dim] = sum(s[dim] for s in shapes)
    return Label(tuple(extent), (*combine(c, others, "join").factors, *([whole] if whole.size > 1 else [])))


def _closure(dims: list[int], labels: list[Label]) -> list[int]:
    """`dims` and all dimensions of factors that share one with them."""
    found = set(dims)
    while True:
        more = {d for x in labels for f in x.factors if found & set(covered(f)) for d in covered(f)}
        if more <= found:
            return sorted(found)
        found |= more


@rule(
    "split split_with_sizes chunk unsafe_chunk unsafe_split tensor_split unbind split_copy",
    takes="self dim indices",
    refuses="tensor_indices_or_sections",
    every_output=True,
    maps="values",
    gains=True,
)
def split(call: Call) -> Result:
    x, dim = call.tensor("self"), call.args.get("dim", 0)
    dim %= x.ndim
    results, start = [], 0
    for number, out in enumerate(call.out):
        size = 1 if call.name == "unbind" else out.shape[dim]
        whole = size == x.shape[dim]
        part = take(call.constraints, x.label, dim, np.arange(start, start + size), None if whole else number)
        results.append(part.drop([dim]) if call.name == "unbind" else part)
        start += size
    return results


@rule("slice narrow slice_copy", takes="self dim start end step length", maps="values", gains=True)
def cut(call: Call) -> Result:
    x = call.tensor("self")
    dim = call.args.get("dim", 0) % x.ndim
    size = x.shape[dim]
    if call.name == "narrow":
        start = call.args["start"] % size if size else 0
        index = np.arange(start, start + call.args["length"])
    else:
        index = np.arange(size)[slice(call.args.get("start"), call.args.get("end"), call.args.get("step", 1))]
    if len(index) == size:
        return x.label
    return take(call.constraints, x.label, dim, index, 0)


@rule("select select_copy", takes="self dim index", maps="values", gains=True)
def select(call: Call) -> Result:
    x = call.tensor("self")
    dim = call.args["dim"] % x.ndim
    index = np.array([call.args["index"] % x.shape[dim]])
    return take(call.constraints, x.label, dim, index, 0 if x.shape[dim] > 1 else None).drop([dim])


@rule("flip roll", takes="self dims shifts", maps="values", gains=True)
def rearrange(call: Call) -> Result:
    """The order along a dimension changes by a fixed rule; what is tied to it afterwards says what may still move."""
    x, label = call.tensor("self"), call.tensor("self").label
    dims = call.args.get("dims") or []
    dims = [dims] if isinstance(dims, int) else list(dims)
    if call.name == "roll" and not dims:
        return fix(call.constraints, label, range(x.ndim), "is rolled")
    shifts = call.args.get("shifts", [])
    shifts = [shifts] if isinstance(shifts, int) else shifts
    for k, d in enumerate(dims):
        d %= x.ndim
        order = np.arange(x.shape[d])
        order = order[::-1] if call.name == "flip" else np.roll(order, shifts[k])
        if label.shape[d] > 1:
            label = take(call.constraints, label, d, order, None)
    return label


@rule(
    "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d"
    " replication_pad2d replication_pad3d _pad_circular _pad_enum",
    takes="self pad padding mode value",
    maps="values",
)
def pad(call: Call) -> Result:
    x = call.tensor("self")
    c, label = call.constraints, x.label
    amounts = call.args["pad" if "pad" in call.args else "padding"]
    constant = call.name == "constant_pad_nd" or call.args.get("mode", "") == "constant"
    if constant and call.args.get("value"):
        hold(call, "is padded with a number")
    for k in range(len(amounts) // 2):
        dim = x.ndim - 1 - k
        before, after = amounts[2 * k], amounts[2 * k + 1]
        if not before and not after:
            continue
        factor = label.factor_on(dim)
        if factor is not None and constant and before >= 0 and after >= 0:
            # The new places hold one constant: elements of their own that are all alike.
            shape = [*factor.shape[:dim], before + after, *factor.shape[dim + 1 :]]
            # Zeros stay zeros under every map; a number would not.
            added = (
                c.helpers_of(shape) if call.args.get("value") else c.fresh(np.zeros(shape, dtype=np.int64))
            )
            pieces = np.split(added, [before], axis=dim)
            new = np.concatenate([pieces[0], factor, pieces[1]], axis=dim)
            label = Label(label.shape, tuple(new if f is factor else f for f in label.factors))
        elif factor is not None:
            label = fix(c, label, [dim], "is padded along its neurons")
        label = label.sized({dim: call.shape[dim]})
    return label


@rule("pixel_shuffle", takes="self upscale_factor", maps="values")
def pixel_shuffle(call: Call) -> Result:
    """[C r r, H, W] -> [C, r H, r W]: a channel moves with its r r positions."""
    x, r = call.tensor("self"), call.args["upscale_factor"]
    *lead, channels, height, width = x.shape
    c, n = call.constraints, len(lead)
    label = fix(c, x.label, [x.ndim - 2, x.ndim - 1], "is shuffled into pixels")
    old = (*lead, channels, height, width)
    label = reshape(c, label, old, (*lead, channels // r**2, r, r, height, width))
    label = fix(c, label, [n + 1, n + 2], "is shuffled into pixels")
    return label.drop([n + 1, n + 2]).sized({n + 1: call.shape[-2], n + 2: call.shape[-1]})


@rule("pixel_unshuffle", takes="self downscale_factor", maps="values")
def pixel_unshuffle(call: Call) -> Result:
    x, r = call.tensor("self"), call.args["downscale_factor"]
    *lead, channels, height, width = x.shape
    c, n = call.constraints, len(lead)
    label = fix(c, x.label, [x.ndim - 2, x.ndim - 1], "is shuffled out of pixels")
    wide = label.drop([n + 1, n + 2]).expand_rank(range(n + 1, n + 5))
    wide = wide.sized(dict(enumerate((height // r, r, width // r, r), n + 1)))
    wide = wide.permute([*range(n + 1), n + 2, n + 4, n + 1, n + 3])
    return reshape(c, wide, (*lead, channels, r, r, height // r, width // r), call.shape)


@rule("channel_shuffle native_channel_shuffle", takes="self groups", maps="values")
def channel_shuffle(call: Call) -> Result:
    x, groups = call.tensor("self"), call.args["groups"]
    split_shape = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    label = reshape(call.constraints, x.label, x.shape, split_shape)
    order = [0, 2, 1, *range(3, len(split_shape))]
    return reshape(call.constraints, label.permute(order), [split_shape[d] for d in order], call.shape)


@rule(
    "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool2d_with_indices"
    " max_pool3d_with_indices max_pool1d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d"
    " adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d"
    " adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d"
    " _upsample_nearest_exact1d _upsample_nearest_exact2d upsample_bilinear2d _upsample_bilinear2d_aa"
    " upsample_bicubic2d _upsample_bicubic2d_aa upsample_linear1d upsample_trilinear3d"
    " fractional_max_pool2d",
    takes="self input",
    refuses="random_samples",
    every_output=True,
    maps="values",
)
def spatial(call: Call) -> Result:
    """Pooling and resizing: channels keep their neurons, space is plain; a maximum is no sum, but knows scales."""
    x = next(call.args[n] for n in ("self", "input") if isinstance(call.args.get(n), Traced))
    count = next((k for k in (1, 2, 3) if f"{k}d" in call.name), 2)
    label = fix(call.constraints, x.label, range(x.ndim - count, x.ndim), "is pooled or resized over")
    if "max_pool" in call.name:
        for factor in label.factors:
            call.constraints.limit(factor, Limit.APART | Limit.POSITIVE, "is searched for its largest values")
    outs = call.outputs
    result = Label((*label.shape[: x.ndim - count], *outs[0].shape[x.ndim - count :]), label.factors)
    return [result] * len(outs)


@rule("glu", takes="self dim", maps="values")
def glu(call: Call) -> Result:
    x, dim = call.tensor("self"), call.args.get("dim", -1)
    dim %= x.ndim
    half = x.shape[dim] // 2
    parts = [take(call.constraints, x.label, dim, np.arange(k * half, (k + 1) * half), k) for k in (0, 1)]
    for factor in parts[1].factors:
        call.constraints.limit(factor, Limit.FIXED, "is a gate")
    return combine(call.constraints, parts, "product")


@rule("diag_embed diagonal im2col", takes="self dim1 dim2")
def unsupported_shape(call: Call) -> Result:
    raise Unsupported("is unfolded into patches" if call.name == "im2col" else "is read along a diagonal")


@rule("view_as_complex")
def as_complex(call: Call) -> Result:
    """The pair (real, imaginary) along the last dimension becomes one number: it can't be split or turned round."""
    x = call.tensor("self")
    return fix(call.constraints, x.label, [x.ndim - 1], "is part of a complex number").drop([x.ndim - 1])


@rule("view_as_real view_as_real_copy")
def as_real(call: Call) -> Result:
    label = call.tensor("self").label.expand_rank([call.tensor("self").ndim])
    return Label(tuple(call.shape), label.factors)

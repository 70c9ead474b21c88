"""Linear maps. All of them are products summed over a shared dimension: align, `combine`, `contract`."""

from __future__ import annotations

from string import ascii_lowercase, ascii_uppercase

import numpy as np

from ..constraints import Constraints
from ..labels import Label, combine, contract, fix, product_sum, reshape
from .registry import Call, Result, Unsupported, hold, rule


def matrix_product(c: Constraints, a: Label, b: Label) -> Label:
    """[..., m, k] @ [..., k, n] -> [..., m, n]."""
    order = [*range(b.ndim - 2), b.ndim - 1, b.ndim - 2]
    left = a.expand_rank([a.ndim - 1])  # [..., m, 1, k]
    right = b.permute(order).expand_rank([b.ndim - 2])  # [..., 1, n, k]
    return product_sum(c, [left, right], [-1])


@rule("matmul mm bmm mv dot vdot linalg_matmul", takes="self other mat2 vec tensor", maps="values")
def matmul(call: Call) -> Result:
    second = next(name for name in ("other", "mat2", "vec", "tensor") if name in call.args)
    a, b = call.tensor("self").label, call.tensor(second).label
    vector_a, vector_b = a.ndim == 1, b.ndim == 1
    a = a.expand_rank([0]) if vector_a else a
    b = b.expand_rank([1]) if vector_b else b
    result = matrix_product(call.constraints, a, b)
    gone = ([result.ndim - 2] if vector_a else []) + ([result.ndim - 1] if vector_b else [])
    return result.drop(gone)


@rule("addmm baddbmm addmv addbmm", takes="self mat1 mat2 batch1 batch2 mat vec", maps="values")
def addmm(call: Call) -> Result:
    c, factors = call.constraints, ("mat1", "mat2", "batch1", "batch2", "mat", "vec")
    a, b = (call.tensor(name).label for name in call.args if name in factors)
    if call.name == "addmv":
        product = matrix_product(c, a, b.expand_rank([1])).drop([1])
    else:
        product = matrix_product(c, a, b)
        product = contract(c, product, [0]) if call.name == "addbmm" else product
    return combine(c, [call.tensor("self").label, product], "sum")


@rule("linear", takes="input weight bias", maps="values")
def linear(call: Call) -> Result:
    c, x, weight = call.constraints, call.tensor("input").label, call.tensor("weight").label
    bias = call.optional("bias")
    if weight.ndim == 1:
        weight = weight.expand_rank([0])
    product = product_sum(c, [x.expand_rank([x.ndim - 1]), weight], [-1])
    result = combine(c, [product, bias.label], "sum") if bias is not None else product
    return result.drop([result.ndim - 1]) if call.tensor("weight").ndim == 1 else result


@rule(
    "_grouped_mm transformers::grouped_mm_fallback",
    takes="self input mat2 weight bias",
    index="offs",
    maps="values",
)
def grouped(call: Call) -> Result:
    """Each row by the matrix of its own group (an expert): rows and groups stay, all groups share their axes."""
    c, x = call.constraints, call.tensor("self" if "self" in call.args else "input")
    weight = call.tensor("mat2" if "mat2" in call.args else "weight")
    if x.ndim != 2 or weight.ndim != 3 or call.optional("bias") is not None:
        raise Unsupported("is multiplied in groups of another form")
    rows = fix(c, x.label, [0], "is one of a group's rows")
    matrix = fix(c, weight.label, [0], "is a group's matrix").drop([0])
    return matrix_product(c, rows, matrix)


@rule("einsum", takes="equation tensors", refuses="a", maps="values")
def einsum(call: Call) -> Result:
    """Each operand is laid out over all the letters, multiplied, and summed over those that the result lacks."""
    c = call.constraints
    equation = call.args["equation"].replace(" ", "")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    labels = [t.label for t in call.args["tensors"]]
    dots = [x for x in ascii_uppercase + ascii_lowercase if x not in equation]
    ranks = [label.ndim - len(t.replace("...", "")) for t, label in zip(terms, labels, strict=True)]
    rank = max(ranks)  # of what the dots stand for
    spread = [t.replace("...", "".join(dots[rank - k : rank])) for t, k in zip(terms, ranks, strict=True)]
    if "->" in equation:
        right = right.replace("...", "".join(dots[:rank]))
    else:
        joined = "".join(spread)
        right = "".join(dots[:rank]) + "".join(
            sorted(x for x in set(joined) if joined.count(x) == 1 and x not in dots[:rank])
        )
    letters = list(dict.fromkeys([*right, *"".join(spread)]))
    laid = []
    for term, label in zip(spread, labels, strict=True):
        if len(set(term)) < len(term):  # a diagonal
            raise Unsupported("is read along a diagonal")
        order = sorted(range(len(term)), key=lambda d, term=term: letters.index(term[d]))
        label = label.permute(order)
        laid.append(label.expand_rank([k for k, x in enumerate(letters) if x not in term]))
    summed = range(len(right), len(letters))
    if len(laid) == 2:
        return product_sum(c, laid, summed)
    if len(laid) > 2:
        hold(call, "is a product of more than two")
    return contract(c, combine(c, laid, "function" if len(laid) > 2 else "product"), summed)


@rule("outer ger", takes="self vec2")
def outer(call: Call) -> Result:
    a, b = call.tensor("self").label, call.tensor("vec2").label
    return combine(call.constraints, [a.expand_rank([1]), b.expand_rank([0])])


@rule("bilinear", takes="input1 input2 weight bias")
def bilinear(call: Call) -> Result:
    c = call.constraints
    x, y, weight = (call.tensor(n).label for n in ("input1", "input2", "weight"))
    left = x.expand_rank([x.ndim - 1, x.ndim + 1])  # [..., 1, i, 1]
    right = y.expand_rank([y.ndim - 1, y.ndim])  # [..., 1, 1, j]
    result = contract(c, combine(c, [left, right, weight]), [-2, -1])
    bias = call.optional("bias")
    return combine(c, [result, bias.label]) if bias is not None else result


@rule(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution",
    takes="input weight bias groups transposed",
    maps="values",
)
def convolution(call: Call) -> Result:
    """[N, C_in, *space] and [C_out, C_in / groups, *kernel] (transposed: [C_in, C_out / groups, *kernel])."""
    c, x, weight = call.constraints, call.tensor("input"), call.tensor("weight")
    groups = int(call.args.get("groups", 1))
    transposed = bool(call.args.get("transposed", False)) or "transpose" in call.name
    space, single = range(2, weight.ndim), x.ndim == weight.ndim - 1  # single: no batch dimension
    image = fix(c, x.label, range(x.ndim - len(space), x.ndim), "is convolved over")
    image = (image.expand_rank([0]) if single else image).drop(space)
    kernel = fix(c, weight.label, space, None).drop(space)
    if transposed:
        kernel = kernel.permute([1, 0])
    if groups == 1:
        product = product_sum(c, [image.expand_rank([1]), kernel], [-1])  # [N, C_out]
    else:
        hold(call, "is convolved in groups")
        product = _grouped(c, image, kernel, weight.shape, groups, transposed)
    bias = call.optional("bias")
    if bias is not None:
        product = combine(c, [product, bias.label], "sum")
    result = product.expand_rank(space).sized(dict(zip(space, call.shape[-len(space) :], strict=True)))
    return result.drop([0]) if single else result


def _grouped(
    c: Constraints, image: Label, kernel: Label, weight_shape: tuple[int, ...], groups: int, transposed: bool
) -> Label:
    """Output channels move freely inside their group, groups move as wholes.

    The input channels of a group keep their place in it: all groups share that axis of the weight (transposed: the
    output channels do), so moving it in one group only is no permutation of an axis.
    """
    n, channels = max(image.shape[0], 1), (weight_shape[0], weight_shape[1] * groups)
    n_in, n_out = channels if transposed else channels[::-1]
    ins, outs = n_in // groups, n_out // groups
    image = reshape(c, image, (n, n_in), (n, groups, ins))
    shared = "is an axis that all groups of the convolution share"
    if transposed:
        kernel = fix(c, kernel, [0], shared)  # [C_out / g, C_in]
        inputs = Label((n_in,), tuple(f.reshape(-1) for f in kernel.factors))
        inputs = reshape(c, inputs, (n_in,), (groups, ins)).right_align(3)
        per_group = contract(c, combine(c, [image, inputs]), [-1])  # [N, g]
        places = c.fresh(np.tile(np.arange(outs), (groups, 1)))  # told apart by their place in the group
        if outs > 1:
            c.mark(places, np.arange(outs)[None, :], shared)
        outputs = Label((1, groups, outs), (places[None],) if places.size > 1 else ())
    else:
        kernel = fix(c, kernel, [1], shared)  # [C_out, C_in / g]
        for factor in image.factors:
            if factor.shape[2] > 1:
                c.mark(factor, np.arange(ins)[None, None, :], shared)
        per_group = contract(c, image, [-1])  # [N, g]
        outputs = Label((n_out,), tuple(f.reshape(-1) for f in kernel.factors if f.shape[0] > 1))
        outputs = reshape(c, outputs, (n_out,), (groups, outs)).right_align(3)
    grid = combine(c, [per_group.expand_rank([2]), outputs])
    return reshape(c, grid, (n, groups, outs), (n, n_out))

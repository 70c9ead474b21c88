"""Labels: which neurons live along which dimensions of an activation, and the three moves all rules are made of.

A tensor's label is a tuple of **factors**. A factor is an integer array of the tensor's rank that holds a distinct
element (see `constraints`) for each index along the dimensions it covers, and has size 1 on the others; factors
cover disjoint dimensions. A hidden layer [batch, token, C] has one factor of shape (1, 1, C), queries
[batch, head, token, d] one of shape (1, H, 1, d). A dimension that no factor covers is **plain**: its indices are
what they are (batch, token, space), unless the tensor is known not to vary along it (**uniform**, extent 1).

Under a legal permutation g the tensor at a position moves to where every factor's element has been moved by g.

    combine   elementwise operators: broadcast, tie what meets, mark what meets a plain dimension
    contract  sums over a dimension: what remains of a factor are the sets of elements summed together
    reshape   moves the labels exactly as the data moves

A linear map M of an axis moves a tensor's values along the factor that the axis is: what `combine` and `contract`
require of M depends on what is computed, which their callers say (`How`). The label of a vector or of squares says so
itself (`gain`, `squares`); moves that do not know what becomes of it forget it, and then less is free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .constraints import Constraints, Gain, Limit

Factor = np.ndarray

How = Literal["function", "sum", "join", "product"]
"""What an elementwise operator is to linear maps: any function, a sum, pieces side by side, or a product of two."""


def covered(factor: Factor) -> tuple[int, ...]:
    """The dimensions along which the factor has neurons."""
    return tuple(d for d, n in enumerate(factor.shape) if n > 1)


@dataclass(frozen=True, eq=False)
class Label:
    """`shape` is the tensor's, except that a uniform dimension counts 1.

    `gain`: the values are those of a parameter with one axis. `squares`: they are the squares of values that the
    factors' maps act on; only their sum over all of a factor is something to linear maps.
    """

    shape: tuple[int, ...]
    factors: tuple[Factor, ...] = ()
    gain: Gain | None = None
    squares: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def plain(self) -> tuple[int, ...]:
        """Dimensions along which the tensor varies without having neurons there."""
        taken = {d for f in self.factors for d in covered(f)}
        return tuple(d for d, n in enumerate(self.shape) if n > 1 and d not in taken)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether this can be the label of a tensor of that shape."""
        return all(
            len(part) == len(shape) and all(a in (1, b) for a, b in zip(part, shape, strict=True))
            for part in (self.shape, *(f.shape for f in self.factors))
        )

    def factor_on(self, dim: int) -> Factor | None:
        return next((f for f in self.factors if f.shape[dim] > 1), None)

    def permute(self, order: Sequence[int]) -> Label:
        return replace(
            self,
            shape=tuple(self.shape[d] for d in order),
            factors=tuple(f.transpose(order) for f in self.factors),
        )

    def expand_rank(self, positions: Iterable[int]) -> Label:
        """Insert dimensions of size 1 at `positions` (of the result, ascending)."""
        shape, factors = list(self.shape), list(self.factors)
        for p in positions:
            shape.insert(p, 1)
            factors = [np.expand_dims(f, p) for f in factors]
        return replace(self, shape=tuple(shape), factors=tuple(factors))

    def drop(self, dims: Iterable[int]) -> Label:
        """Remove dimensions of which no factor covers any; the caller has dealt with them."""
        gone = set(dims)
        kept = [d for d in range(self.ndim) if d not in gone]
        return replace(
            self,
            shape=tuple(self.shape[d] for d in kept),
            factors=tuple(f.reshape([f.shape[d] for d in kept]) for f in self.factors),
        )

    def sized(self, sizes: Mapping[int, int]) -> Label:
        """With another extent on some dimensions, of which no factor covers any."""
        return replace(self, shape=tuple(sizes.get(d, n) for d, n in enumerate(self.shape)))

    def right_align(self, ndim: int) -> Label:
        return self.expand_rank([0] * (ndim - self.ndim))

    def map_factors(self, new: Sequence[Factor]) -> Label:
        return replace(self, factors=tuple(f for f in new if f.size > 1))


def flat_index(shape: Sequence[int], dims: Sequence[int]) -> np.ndarray:
    """An array of `len(shape)` dimensions, full-sized on `dims`, that numbers the index tuples along them."""
    sizes = [n if d in dims else 1 for d, n in enumerate(shape)]
    return np.arange(math.prod(sizes)).reshape(sizes)


def combine(
    constraints: Constraints,
    operands: Sequence[Label],
    how: How = "function",
    summed: Sequence[int] = (),
) -> Label:
    """The label of an elementwise operator's result; records what the operator ties together.

    Factors that meet on the same dimensions are tied element by element. A factor that meets one on more dimensions
    (a gate for each head on [head, d]) makes sets of the finer one's elements. A plain dimension of one operand
    that meets neurons of another marks them by their index: they never swap.

    Args:
        how: what the operator is to linear maps of the factors.
        summed: dimensions of the result over which the products are summed afterwards, by `contract`.
    """
    gains = [o.gain for o in operands]
    ndim = max(o.ndim for o in operands)
    operands = [o.right_align(ndim) for o in operands]
    shape = tuple(max(o.shape[d] for o in operands) for d in range(ndim))
    result: list[Factor] = []
    for together in _connected([f for o in operands for f in o.factors]):
        dims = sorted({d for f in together for d in covered(f)})
        finest = next((f for f in together if len(covered(f)) == len(dims)), None)
        if finest is None:
            for factor in together:
                constraints.limit(factor, Limit.FIXED, "meets neurons along other dimensions")
            finest = constraints.helpers_of([shape[d] if d in dims else 1 for d in range(ndim)])
        for factor in together:
            if factor.shape == finest.shape:
                constraints.tie(finest, factor, linked=False)
            else:
                constraints.member(finest, factor)
        for operand in operands:
            fixed = [d for d in operand.plain if d in dims]
            if fixed:
                constraints.mark(finest, flat_index(finest.shape, fixed), "meets values that have no neurons")
        here = [[f for f in o.factors if any(f is t for t in together)] for o in operands]
        match how:
            case "sum" | "join":
                _add(constraints, operands, here, dims, finest, how)
            case "product":
                finest = _multiply(constraints, here, gains, dims, finest, set(summed))
            case _:
                for factor in together:
                    constraints.limit(factor, Limit.FIXED, "goes through a function")
        result.append(finest)
    return Label(shape, tuple(result))


def _add(
    c: Constraints,
    operands: Sequence[Label],
    here: list[list[Factor]],
    dims: list[int],
    finest: Factor,
    how: How,
) -> None:
    """The same map acts on all; one that keeps the ones keeps what is added alike along the dimension."""
    for operand, factors in zip(operands, here, strict=True):
        if len(factors) == 1 and factors[0].shape == finest.shape:
            if factors[0] is not finest:
                c.link(finest, factors[0])
            continue
        uniform = not factors and how == "sum" and not any(d in dims for d in operand.plain)
        kept = Limit.ISOMETRY | Limit.ONES if uniform else Limit.FIXED
        for factor in (finest, *factors):
            c.limit(factor, kept, "is added to what has no neurons there")


def _multiply(
    c: Constraints,
    here: list[list[Factor]],
    gains: Sequence[Gain | None],
    dims: list[int],
    finest: Factor,
    summed: set[int],
) -> Factor:
    """The factor of a product of two. A sum over its elements is kept if the one's map is dual to the other's."""
    met = [(factors, gain) for factors, gain in zip(here, gains, strict=True) if factors]
    over = bool(summed & set(dims))
    if len(met) == 1 and len(met[0][0]) == 1:  # the other has no neurons here
        if over:
            c.limit(finest, Limit.FIXED, "is summed with weights that have no neurons")
        return finest
    if len(met) != 2 or any(len(factors) != 1 for factors, _ in met):
        for factors, _ in met:
            for factor in factors:
                c.limit(factor, Limit.FIXED, "meets neurons along other dimensions")
        return finest
    (a,), gain_a = met[0]
    (b,), gain_b = met[1]
    if a.shape != b.shape:  # a factor for each set: an invariant, times what is in the set
        coarse = b if a is finest else a
        c.limit(coarse, Limit.FIXED, "is multiplied with several neurons each")
        if over:
            c.limit(finest, Limit.FIXED, "is summed with weights of whole sets")
        return finest
    if over:
        c.link(a, b, dual=True)
        return finest
    if gain_a is not None and gain_b is None:
        a, b, gain_b = b, a, gain_a
    product = c.fresh(np.zeros(finest.shape, dtype=np.int64))
    c.tie(finest, product, linked=False)
    c.link(product, a, scale=b, gain=gain_b)
    c.limit(b, Limit.APART, None)
    if gain_b is None:
        c.limit(a, Limit.APART, "is multiplied element by element")
    return product


def _connected(factors: list[Factor]) -> list[list[Factor]]:
    """Factors in lists that share dimensions, in order of first appearance."""
    groups: list[tuple[set[int], list[Factor]]] = []
    for factor in factors:
        dims, members = set(covered(factor)), [factor]
        rest = []
        for other_dims, others in groups:
            if other_dims & dims:
                dims, members = dims | other_dims, others + members
            else:
                rest.append((other_dims, others))
        groups = [*rest, (dims, members)]
    return [members for _, members in groups]


def contract(
    constraints: Constraints,
    label: Label,
    dims: Iterable[int],
    keep: bool = False,
    kept: Limit | None = Limit.ISOMETRY | Limit.ONES,
) -> Label:
    """Sum (or mean, maximum, ...) over `dims`: a factor wholly inside vanishes, one partly inside leaves its sets.

    Args:
        kept: the linear maps of a factor's elements that leave the result as it is; None: nothing is to be said here.
    """
    gone = {d % label.ndim for d in dims} if label.ndim else set()
    factors = []
    for factor in label.factors:
        inside = [d for d in covered(factor) if d not in gone]
        if len(inside) == len(covered(factor)):
            factors.append(factor)
            continue
        if kept is not None:
            constraints.limit(factor, kept, "is summed over")
        if inside:
            factors.append(constraints.sets_of(factor, tuple(inside)))
        else:
            constraints.used.append(factor.ravel())
    result = Label(label.sized(dict.fromkeys(gone, 1)).shape, tuple(factors))
    return result if keep else result.drop(gone)


def product_sum(constraints: Constraints, operands: Sequence[Label], dims: Sequence[int]) -> Label:
    """Multiply two operands and sum over `dims` (numbers from the end): a matrix product, once both are laid out."""
    ndim = max(o.ndim for o in operands)
    summed = [d % ndim for d in dims]
    together = combine(constraints, operands, "product", summed)
    return contract(constraints, together, summed, kept=None)


def normalise(
    constraints: Constraints, label: Label, dims: Iterable[int], kept: Limit = Limit.FIXED
) -> Label:
    """Softmax, layer norm and the like over `dims`: the result keeps its neurons, what is summed together is a set.

    It is a function of each row: no linear map may act between rows.
    """
    over = {d % label.ndim for d in dims}
    for factor in label.factors:
        if not over & set(covered(factor)):
            constraints.limit(factor, Limit.FIXED, "is normalised")
    contract(constraints, label, over, kept=kept)
    return label


def fix(constraints: Constraints, label: Label, dims: Iterable[int], why: str | None) -> Label:
    """Make `dims` plain: neurons along them may not move there, those along other dimensions still may."""
    gone = {d % label.ndim for d in dims}
    factors = []
    for factor in label.factors:
        inside = [d for d in covered(factor) if d in gone]
        if inside:
            constraints.limit(factor, Limit.FIXED, why)
            constraints.mark(factor, flat_index(factor.shape, inside), why)
            rest = tuple(d for d in covered(factor) if d not in gone)
            if rest:
                factors.append(constraints.sets_of(factor, rest))
        else:
            factors.append(factor)
    return Label(label.shape, tuple(factors))


def pin(constraints: Constraints, label: Label, why: str) -> Label:
    """Nothing of this tensor may move."""
    for factor in label.factors:
        constraints.limit(factor, Limit.FIXED, why)
        constraints.pin(factor, why)
    return Label(label.shape)


def take(constraints: Constraints, label: Label, dim: int, index: np.ndarray, piece: int | None) -> Label:
    """The positions `index` along `dim`; `piece` not None marks those neurons: a part is not the whole."""
    factors = []
    for factor in label.factors:
        if factor.shape[dim] > 1:
            factor = np.take(factor, index, axis=dim)
            if piece is not None:
                constraints.mark(factor, np.asarray(piece), "is cut out of its dimension")
            if factor.size == 1:
                constraints.limit(factor, Limit.FIXED, "is cut out alone")
        factors.append(factor)
    sized = label.sized({dim: len(index)} if label.shape[dim] > 1 else {})
    return sized.map_factors(factors)


def distinct(constraints: Constraints, factor: Factor, roles: np.ndarray) -> Factor:
    """`factor` if its elements are distinct, else copies of them that `roles` (same shape) tell apart."""
    if np.unique(factor).size == factor.size:
        return factor
    copies = constraints.fresh(np.broadcast_to(roles, factor.shape))
    constraints.tie(factor, copies)
    return copies


def reshape(constraints: Constraints, label: Label, old: Sequence[int], new: Sequence[int]) -> Label:
    """The label after `view(new)` of a tensor of shape `old`; moves labels exactly as the data moves.

    Where a labelled and a plain dimension merge (convolution, flatten, linear), a neuron occurs several times along
    the new dimension: its occurrences become copies that keep their place (role). Where two factors merge, their
    pairs become elements that belong to both. A tensor without elements is treated as if it had some.
    """
    if 0 in old:
        old, new = [n or 1 for n in old], [n or 1 for n in new]
        if math.prod(old) != math.prod(new):
            fix(constraints, label, range(len(old)), "is laid out anew without elements")
            return Label((1,) * len(new))
    segments = _segments(old, new)
    factors = list(label.factors)
    for ins, outs in segments:  # two factors that the same segment mixes must be one before
        here = [f for f in factors if any(d in ins for d in covered(f))]
        if len(here) > 1 and not _clean_split(here, old, ins, new, outs):
            dims = {d for f in here for d in covered(f)}
            joint = constraints.helpers_of([n if d in dims else 1 for d, n in enumerate(old)])
            for f in here:
                constraints.member(joint, f)
                constraints.limit(f, Limit.FIXED, "is laid out with neurons of another dimension")
            factors = [f for f in factors if not any(f is h for h in here)] + [joint]
    moved = [_reshape_factor(constraints, f, old, new, segments) for f in factors]
    uniform = [d for ins, outs in segments if all(label.shape[d] == 1 for d in ins) for d in outs]
    return Label(tuple(new)).sized(dict.fromkeys(uniform, 1)).map_factors(moved)


def _segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into the smallest runs of input and output dimensions of equal product."""
    segments, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        ins, outs = [], []
        p = q = 1
        if i < len(old):
            ins, p, i = [i], old[i], i + 1
        if j < len(new):
            outs, q, j = [j], new[j], j + 1
        while p != q or not ins or not outs:
            if (p < q or not ins) and i < len(old):
                ins, p, i = [*ins, i], p * old[i], i + 1
            elif j < len(new):
                outs, q, j = [*outs, j], q * new[j], j + 1
            else:
                break
        segments.append((ins, outs))
    return segments


def _move(
    array: np.ndarray, old: Sequence[int], new: Sequence[int], ins: list[int], outs: list[int]
) -> np.ndarray:
    """Expand `array` (rank of `old`) on the segment `ins` and give that segment the output dimensions instead."""
    lead, tail = array.shape[: ins[0]] if ins else array.shape, array.shape[ins[-1] + 1 :] if ins else ()
    middle = np.broadcast_to(array, [*lead, *(old[d] for d in ins), *tail])
    return middle.reshape([*lead, *(new[d] for d in outs), *tail])


def _moved_index(old: Sequence[int], dims: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """What becomes of the index along `dims` of a tensor of shape `old` in `view(new)`."""
    return np.broadcast_to(flat_index(old, dims), old).reshape(new)


def _varies(array: np.ndarray, axis: int) -> bool:
    return bool(array.shape[axis] > 1 and (array != np.take(array, [0], axis=axis)).any())


def _clean_split(
    factors: list[Factor], old: Sequence[int], ins: list[int], new: Sequence[int], outs: list[int]
) -> bool:
    """Whether the reshape of one segment keeps the factors on output dimensions of their own."""
    sizes_in, sizes_out = [old[d] for d in ins], [new[d] for d in outs]
    used: set[int] = set()
    for factor in factors:
        mine = [k for k, d in enumerate(ins) if factor.shape[d] > 1]
        numbers = _moved_index(sizes_in, mine, sizes_out)
        others = _moved_index(sizes_in, [k for k in range(len(ins)) if k not in mine], sizes_out)
        dims = {k for k in range(len(outs)) if _varies(numbers, k)}
        if dims & used or any(_varies(others, k) for k in dims):
            return False
        used |= dims
    return True


def _reshape_factor(
    constraints: Constraints,
    factor: Factor,
    old: Sequence[int],
    new: Sequence[int],
    segments: list[tuple[list[int], list[int]]],
) -> Factor:
    array, roles = factor, np.zeros([1] * len(old), dtype=np.int64)
    mixed = False
    shift_old, done = list(old), 0  # dimensions before `done` are already those of `new`
    for ins, outs in segments:
        if not ins or not outs:  # a leading or trailing 1 appears or disappears
            at = done
            for _ in outs:
                array, roles = np.expand_dims(array, at), np.expand_dims(roles, at)
                shift_old.insert(at, 1)
            for _ in ins:
                array, roles = np.squeeze(array, at), np.squeeze(roles, at)
                shift_old.pop(at)
            done += len(outs)
            continue
        at = list(range(done, done + len(ins)))
        target_sizes = [new[d] for d in outs]
        mapped_new = [*shift_old[:done], *target_sizes]
        labelled = [d for d in at if array.shape[d] > 1]
        plain = [d for d in at if array.shape[d] == 1 and shift_old[d] > 1]
        places = list(range(done, done + len(outs)))
        roles = roles.reshape([*roles.shape[:done], *[1] * len(outs), *roles.shape[done + len(ins) :]])
        if not labelled:
            array = array.reshape([*array.shape[:done], *[1] * len(outs), *array.shape[done + len(ins) :]])
        else:
            moved = _move(array, shift_old, mapped_new, at, places)
            sizes = [shift_old[d] for d in at]
            place = _moved_index(sizes, [d - done for d in plain], target_sizes)
            numbers = _moved_index(sizes, [d - done for d in labelled], target_sizes)
            keep = [k for k in range(len(outs)) if _varies(numbers, k)]
            cut = tuple(slice(None) if k in keep else slice(0, 1) for k in range(len(outs)))
            array = moved[(*[slice(None)] * done, *cut)]
            place = place[cut]
            if any(_varies(place, k) for k in range(place.ndim)):
                mixed = True
                lead, tail = [1] * done, [1] * (array.ndim - done - len(outs))
                roles = roles * (int(place.max()) + 1) + place.reshape([*lead, *place.shape, *tail])
        shift_old = [*shift_old[:done], *target_sizes, *shift_old[done + len(ins) :]]
        done += len(outs)
    if (again := _parted(constraints, array, roles)) is not None:
        return again
    if mixed:
        return constraints.copy(array, roles)
    return np.ascontiguousarray(array)


def _parted(constraints: Constraints, array: Factor, roles: np.ndarray) -> Factor | None:
    """What `array` has copies of, if neurons and places along plain dimensions lie on dimensions of their own again: a
    batch that was merged with heads and is split off. None if that is not so.
    """
    told, origins = [roles], array
    found = None
    while (known := constraints.copied(origins)) is not None:
        origins, role = known
        told.append(role)
        dims = [d for d in range(origins.ndim) if _varies(origins, d)]
        if not any(_varies(one, d) for one in told for d in dims):
            found = origins[tuple(slice(None) if d in dims else slice(0, 1) for d in range(origins.ndim))]
    return None if found is None else np.ascontiguousarray(found)

"""From links and limits to the groups of linear maps: which neurons may be mixed, by which matrices, and where.

1. Elements that links join share one matrix. One of them is the **root**; of every other the record says how its
   matrix follows from the root's M: M_e = S G M G^-1 or S G M^-T G^-1 (`Relations`), with G a vector that the model
   multiplies by and S the scales that act on such a vector. Two ways to the same element that disagree limit M.
2. A limit of an element is a limit of its root's M (of S, too), so every root ends with one of a few kinds of groups.
3. Neurons of which the same was recorded, up to which of them they are, may be mixed: they are a block. Blocks that
   sit at the same sites (the heads of a layer) make one `ContinuousGroup`. If the copies of a block's neurons along an
   axis can't be told apart, its neurons keep to themselves: scales need no such order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..spec import ContinuousGroup, GainSite, Kind, MapSite, indices
from .constraints import AxisElements, Constraints, Limit, Link
from .solve import classes_of, mix

_NONE = np.zeros(0, dtype=np.int64)
_ROW, _SET, _LINK, _PLACE, _FLAGS = (np.uint64(k) for k in range(11, 16))


@dataclass(eq=False)
class Relations:
    """M_e = S^s G^g M_root^p G^-g for each element e; [elements] each, as narrow as may be: there are millions.

    `dual` 1: M_root^-T. `scale`, `gain`: the elements of the vectors whose scales and values S and G are (-1: none),
    `scale_power`, `gain_power` their exponents, `offset` what is added to the values (a number of `offsets`).
    `clash`: vectors met that are not one power of one vector.
    """

    dual: np.ndarray
    scale: np.ndarray
    scale_power: np.ndarray
    gain: np.ndarray
    gain_power: np.ndarray
    offset: np.ndarray
    clash: np.ndarray

    @classmethod
    def identities(cls, size: int) -> Relations:
        dual, scale_power, gain_power, offset = (np.zeros(size, dtype=np.int16) for _ in range(4))
        scale, gain = (np.full(size, -1, dtype=np.int32) for _ in range(2))
        return cls(dual, scale, scale_power, gain, gain_power, offset, np.zeros(size, dtype=bool))

    def pick(self, which: np.ndarray) -> Relations:
        return Relations(*(value[which] for value in vars(self).values()))

    def put(self, which: np.ndarray, other: Relations) -> None:
        for own, value in zip(_values(self), _values(other), strict=True):
            own[which] = value

    def inverse_of_transposed(self) -> Relations:
        """Those of M_e^-T."""
        return Relations(
            1 - self.dual,
            self.scale,
            -self.scale_power,
            self.gain,
            -self.gain_power,
            self.offset,
            self.clash,
        )

    def after(self, other: Relations) -> Relations:
        """S G (those of `other`) G^-1 with this one's S and G; its `dual` is applied to `other` before."""
        turned = other.inverse_of_transposed()
        inner = Relations(
            *(np.where(self.dual == 1, a, b) for a, b in zip(*map(_values, (turned, other)), strict=True))
        )
        scale, scale_power, clash = _product(self.scale, self.scale_power, inner.scale, inner.scale_power)
        gain, gain_power, other_clash = _product(self.gain, self.gain_power, inner.gain, inner.gain_power)
        offset = np.where(self.gain >= 0, self.offset, inner.offset)
        clash = clash | other_clash | inner.clash
        clash |= (self.gain >= 0) & (inner.gain >= 0) & (self.offset != inner.offset)
        return Relations(inner.dual, scale, scale_power, gain, gain_power, offset, clash)


def _values(relations: Relations) -> list[np.ndarray]:
    return list(vars(relations).values())


def _product(
    a: np.ndarray, power_a: np.ndarray, b: np.ndarray, power_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The vector and power of a product of powers of two vectors, and where that is none."""
    clash = (a >= 0) & (b >= 0) & (a != b)
    vector = np.where(a >= 0, a, b)
    power = np.where(clash, power_a, power_a + power_b)
    return np.where(power == 0, -1, vector), power, clash


def _link_relations(links: list[Link], offsets: list[float]) -> tuple[np.ndarray, np.ndarray, Relations]:
    """All links as one: elements a and b, and the relation of M_a to M_b."""
    a = np.concatenate([_NONE, *(link.a for link in links)])
    b = np.concatenate([_NONE, *(link.b for link in links)])
    made, end = Relations.identities(a.size), 0
    for link in links:
        own, end = slice(end, end + link.a.size), end + link.a.size
        made.dual[own] = link.dual
        if link.scale is not None:
            made.scale[own], made.scale_power[own] = link.scale, 1
        if link.gain is not None:
            made.gain[own], made.gain_power[own] = link.scale, 1
            made.offset[own] = _number(offsets, link.gain.offset)
    return a, b, made


def _number(offsets: list[float], offset: float) -> int:
    if offset not in offsets:
        offsets.append(offset)
    return offsets.index(offset)


def _without_fixed(
    constraints: Constraints, a: np.ndarray, b: np.ndarray, link: Relations
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray, Relations]]:
    """The same links where M_a = S G M_b G^-1 has only the identity for one of the two: then it says M_a = S (or M_b =
    S^-1), so that several norms may write into one stream that is scaled. Elements that were found to be fixed, and the
    class of each element that these links join, first.

    What is fixed by itself is known without these links, but that matrices are diagonal passes through them.
    """
    raw = np.zeros(constraints.size, dtype=np.int64)
    for elements, what, _ in constraints.limits:
        np.bitwise_or.at(raw, elements, int(what))
    found: list[np.ndarray] = [_NONE]
    a, b, link, scaled = a.copy(), b.copy(), link.pick(np.arange(a.size)), np.flatnonzero(link.scale >= 0)
    bare = link.scale < 0
    owner = classes_of(constraints.size, [(a[bare], b[bare])])
    own = _joined(owner, raw)
    while scaled.size:
        classes = owner[a[scaled]], owner[b[scaled]]
        whole = classes_of(own.size, [classes])
        flags = own | _joined(whole, own & int(Limit.APART))[whole]
        still = flags & Limit.FIXED > 0
        for together in (Limit.APART | Limit.ONES, Limit.APART | Limit.ISOMETRY | Limit.POSITIVE):
            still |= (flags & int(together)) == int(together)
        inner = still[classes[1]]
        outer = still[classes[0]] & ~inner
        if not (inner | outer).any():
            return np.concatenate(found), whole[owner], (a, b, link)
        found += [b[scaled[inner]], a[scaled[outer]]]
        for elements in found[-2:]:
            own[owner[elements]] |= int(Limit.FIXED)
        # M_b is that of S, to the power -1; a dual of a diagonal matrix is its inverse.
        turned, bare = scaled[outer], scaled[inner | outer]
        a[turned], b[bare] = b[turned], link.scale[bare]
        link.dual[scaled[inner]], link.dual[turned] = 0, 1 - link.dual[turned]
        link.scale[bare] = link.gain[bare] = -1
        link.scale_power[bare] = link.gain_power[bare] = link.offset[bare] = 0
        merged = classes_of(own.size, [(owner[a[bare]], owner[b[bare]])])
        own, owner, scaled = _joined(merged, own), merged[owner], scaled[~(inner | outer)]
    return np.concatenate(found), owner, (a, b, link)


def _joined(owner: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """All flags of each class."""
    joined, some = np.zeros(int(owner.max()) + 1, dtype=np.int64), np.flatnonzero(flags)
    np.bitwise_or.at(joined, owner[some], flags[some])
    return joined


def _relate(size: int, roots: np.ndarray, a: np.ndarray, b: np.ndarray, link: Relations) -> Relations:
    """How each element's matrix follows from its root's: along links, from the roots outwards."""
    found, known = Relations.identities(size), np.zeros(size, dtype=bool)
    known[roots] = True
    backwards = _backwards(link)
    open_ = np.arange(a.size)
    while open_.size:
        reached = False
        for target, source, way in ((a, b, link), (b, a, backwards)):
            edges = open_[known[source[open_]] & ~known[target[open_]]]
            if edges.size:
                edges = edges[np.unique(target[edges], return_index=True)[1]]
                found.put(target[edges], way.pick(edges).after(found.pick(source[edges])))
                known[target[edges]] = True
                reached = True
        if not reached:
            break
        open_ = open_[~(known[a[open_]] & known[b[open_]])]
    return found


def _backwards(link: Relations) -> Relations:
    """The relation of M_b to M_a; that of a dual is the same."""
    sign = np.where(link.dual == 1, 1, -1)
    return Relations(
        link.dual,
        link.scale,
        sign * link.scale_power,
        link.gain,
        sign * link.gain_power,
        link.offset,
        link.clash,
    )


@dataclass(eq=False)
class _Occurrences:
    """Where the matrices act: element `element` gets class `owner`'s, to the power `power` (-1: inverse transpose).

    `scales`: 1 where a vector's scales act on what was multiplied by it.
    """

    owner: np.ndarray
    element: np.ndarray
    power: np.ndarray
    gain: np.ndarray
    gain_power: np.ndarray
    offset: np.ndarray
    scales: np.ndarray

    def pick(self, which: np.ndarray) -> _Occurrences:
        return _Occurrences(*(value[which] for value in vars(self).values()))


def solve_maps(constraints: Constraints) -> tuple[ContinuousGroup, ...]:
    """The groups of linear maps that leave the function of the walked model as it is."""
    size = constraints.size
    if not size:
        return ()
    offsets = [0.0]
    a, b, link = _link_relations(constraints.links, offsets)
    joined, vectors = (a, b), link.scale[link.scale >= 0]
    still, owner, (a, b, link) = _without_fixed(constraints, a, b, link)
    relations = _relate(size, _roots(constraints, owner, vectors), a, b, link)
    limits = [*constraints.limits, (still, Limit.FIXED, None)]
    flags, reasons = _flags(limits, owner, relations, (a, b, link))
    axis = _axis_of(constraints)
    touched = np.zeros(flags.size, dtype=bool)
    touched[owner[np.concatenate([a, b, relations.scale[relations.scale >= 0]])]] = True
    free = touched & (flags & Limit.FIXED == 0)
    where = _occurrences(owner, relations, flags, axis, free)
    mixing = (free & (flags & Limit.APART == 0))[owner]
    rows = _rows(constraints, *joined, mixing)
    numbers = np.array([axis_.start for axis_ in constraints.axes], dtype=np.int64)
    return tuple(_groups(_Problem(constraints, offsets, axis, numbers, where, rows, flags, *reasons)))


def _roots(constraints: Constraints, owner: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """An element for each class: the first whose inner products are to stay (it should bear no gain), one of the
    `vectors` that are multiplied by, or the first.
    """
    priority = np.full(owner.size, 2)
    priority[vectors] = 1
    for elements, what, _ in constraints.limits:
        if what & Limit.ISOMETRY:
            priority[elements] = 0
    order = np.lexsort((np.arange(owner.size), priority, owner))
    return order[np.flatnonzero(np.diff(owner[order], prepend=-1))]


def _flags(
    limits: list[tuple[np.ndarray, Limit, str | None]],
    owner: np.ndarray,
    relations: Relations,
    links: tuple[np.ndarray, np.ndarray, Relations],
) -> tuple[np.ndarray, tuple[np.ndarray, list[str]]]:
    """What is asked of each class's matrix, and by whom first: a number (-1: nobody) in a list of reasons."""
    flags = np.zeros(int(owner.max()) + 1, dtype=np.int64)
    number: dict[str, int] = {}  # of the reasons
    blame = np.full(flags.size, -1, dtype=np.int64)

    def limit(elements: np.ndarray, what: Limit, why: str | None) -> None:
        classes = owner[elements]
        if why is not None:
            new = classes[(flags[classes] | int(what)) != flags[classes]]
            blame[new] = number.setdefault(why, len(number))
        np.bitwise_or.at(flags, classes, int(what))

    def limit_scales(elements: np.ndarray, what: Limit, why: str | None) -> None:
        scales = relations.scale[elements]
        limit(scales[scales >= 0], what, why)

    for elements, what, why in limits:
        turned = (relations.scale[elements] >= 0) | (relations.gain[elements] >= 0)
        limit(elements[~turned], what, why)
        rest = elements[turned]
        if not rest.size:
            continue
        if what & (Limit.ISOMETRY | Limit.ONES):
            # Of S G M G^-1 for any G: M has signs only, and S none.
            what = what | Limit.APART
            limit_scales(rest, Limit.FIXED, why)
        limit(rest, what, why)
        limit_scales(rest, what, why)
    a, b, link = links
    actual, other = relations.pick(a), link.after(relations.pick(b))
    why = "two ways to the same neurons disagree"
    clash = actual.clash | other.clash
    scales_differ = (actual.scale != other.scale) | (actual.scale_power != other.scale_power)
    gains_differ = (actual.gain != other.gain) | (actual.gain_power != other.gain_power)
    gains_differ |= (actual.gain >= 0) & (actual.offset != other.offset)
    for which, what in (
        (actual.dual != other.dual, Limit.ISOMETRY),
        (gains_differ, Limit.APART),
        (clash, Limit.FIXED),
    ):
        limit(a[which], what, why)
    # Where two vectors meet, one of them is in no relation any more: it is that of an end of the link.
    for which in (scales_differ, clash):
        for relation in (actual, other, link, relations.pick(b)):
            scale = relation.scale[which]
            limit(scale[scale >= 0], Limit.FIXED, why)
    is_used = np.zeros(owner.size, dtype=bool)
    is_used[relations.scale[relations.scale >= 0]] = True
    used = np.flatnonzero(is_used)
    limit(used, Limit.APART, None)
    # The scales of a vector that is a scaled one itself: not expressed.
    nested = used[relations.scale[used] >= 0]
    limit(nested, Limit.FIXED, why)
    limit_scales(nested, Limit.FIXED, why)
    rigid = Limit.APART | Limit.ISOMETRY
    for together in (rigid | Limit.ONES, rigid | Limit.POSITIVE):
        flags[(flags & int(together)) == int(together)] |= int(Limit.FIXED)
    return flags, (blame, list(number))


def _axis_of(constraints: Constraints) -> np.ndarray:
    axis = np.full(constraints.size, -1, dtype=np.int64)
    for number, one in enumerate(constraints.axes):
        axis[one.start : one.start + one.size] = number
    return axis


def _occurrences(
    owner: np.ndarray, relations: Relations, flags: np.ndarray, axis: np.ndarray, free: np.ndarray
) -> _Occurrences:
    elements = np.flatnonzero(axis >= 0)
    apart = (flags[owner[elements]] & Limit.APART) > 0
    own = _Occurrences(
        owner[elements],
        elements,
        1 - 2 * relations.dual[elements],
        np.where(apart, -1, relations.gain[elements]),  # scales pass a gain
        np.where(apart, 0, relations.gain_power[elements]),
        np.where(apart, 0, relations.offset[elements]),
        np.zeros_like(elements),
    )
    scaled = elements[relations.scale[elements] >= 0]
    scale = relations.scale[scaled]
    none = np.full(scaled.size, -1)
    power = relations.scale_power[scaled] * (1 - 2 * relations.dual[scale])
    added = _Occurrences(owner[scale], scaled, power, none, none * 0, none * 0, -none)
    whole = _Occurrences(
        *(np.concatenate(pair) for pair in zip(vars(own).values(), vars(added).values(), strict=True))
    )
    return whole.pick(free[whole.owner])


def _rows(constraints: Constraints, a: np.ndarray, b: np.ndarray, mixing: np.ndarray) -> np.ndarray:
    """A hash of what tells an element from others that are mixed with it: its cuts, sets, roles; uint64 [elements].

    What is told of a copy is told of the neuron, however many copies lie between: where matrices mix neurons (`mixing`)
    until no two elements of one kind are told apart any more that were not before.
    """
    rows = np.zeros(constraints.size, dtype=np.uint64)
    for number, (elements, values, _) in enumerate(constraints.marks):
        np.add.at(rows, elements, mix(_ROW, number, values))
    for number, (elements, blocks) in enumerate(constraints.members):
        np.add.at(rows, elements, mix(_SET, number, blocks))
    for helper in constraints.helpers:
        rows[helper.start : helper.start + helper.roles.size] += mix(_ROW, helper.roles)
    sizes = [link.a.size for link in constraints.links]
    number = np.repeat(np.arange(len(sizes)), sizes)
    for _ in range(2):
        rows = _told(rows, a, b, number)
    within = mixing[a] & mixing[b]
    a, b, number, mine = a[within], b[within], number[within], np.flatnonzero(mixing)
    # Elements of different records are told apart from the start, so that the rounds are few.
    record = np.zeros(constraints.size, dtype=np.int64)
    for kind, starts in enumerate((constraints.axes, constraints.helpers)):
        for place, one in enumerate(starts):
            size = one.size if isinstance(one, AxisElements) else one.roles.size
            record[one.start : one.start + size] = 2 * place + kind
    rows[mine] = mix(rows[mine], record[mine])
    kinds = 0
    while mine.size and (now := _distinct(rows[mine]).size) > kinds:
        kinds, rows = now, _told(rows, a, b, number)
    return rows


def _told(rows: np.ndarray, a: np.ndarray, b: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Each element's row, and those of what it is linked to."""
    told = rows.copy()
    np.add.at(told, a, mix(_LINK, number, 0, rows[b]))
    np.add.at(told, b, mix(_LINK, number, 1, rows[a]))
    return told


@dataclass(frozen=True, eq=False)
class _Problem:
    constraints: Constraints
    offsets: list[float]
    axis: np.ndarray
    starts: np.ndarray
    where: _Occurrences
    rows: np.ndarray
    flags: np.ndarray
    blame: np.ndarray
    reasons: list[str]


def _groups(problem: _Problem) -> Iterator[ContinuousGroup]:
    where = problem.where
    if not where.owner.size:
        return
    place = mix(
        _PLACE,
        problem.axis[where.element],
        where.power,
        np.where(where.gain >= 0, problem.axis[where.gain], -1),
        where.gain_power,
        where.offset,
        where.scales,
    )
    full = mix(place, problem.rows[where.element])
    count = problem.flags.size
    inner, outer = (np.zeros(count, dtype=np.uint64) for _ in range(2))
    np.add.at(inner, where.owner, full)
    np.add.at(outer, where.owner, place)
    present = np.zeros(count, dtype=bool)
    present[where.owner] = True
    classes = np.flatnonzero(present)
    flags = problem.flags[classes]
    apart = (flags & Limit.APART) > 0
    # Neurons that may be mixed: of the same class of records; others stand for themselves.
    block = np.where(apart, mix(_FLAGS, classes), mix(inner[classes], flags))
    _, block = np.unique(block, return_inverse=True)
    block, apart = _told_apart(problem, classes, block, apart, full)
    sizes = np.bincount(block)
    key = mix(outer[classes], flags & ~np.int64(Limit.APART), sizes[block], apart & (sizes[block] > 1))
    first = np.full(count, -1)
    first[classes] = np.arange(classes.size)
    lowest = np.full(count, where.element.size and int(where.element.max()) + 1)
    np.minimum.at(lowest, where.owner, where.element)
    # By where they begin; a stream and the scales of what it is multiplied by may begin at the same element.
    low = lowest[classes]
    order = np.lexsort((low, block, _first_of(block, low), key, _first_of(key, low)))
    cuts = np.flatnonzero(np.diff(key[order].astype(np.uint64)) != 0) + 1
    names: set[str] = set()
    position, block_of = np.empty(count, dtype=np.int64), np.full(count, -1)
    block_of[classes] = block
    by_owner = np.argsort(where.owner, kind="stable")
    owners = where.owner[by_owner]
    for run in np.split(order, cuts):
        mine = classes[run]
        kind = _kind(int(problem.flags[mine[0]]), int(sizes[block[run[0]]]))
        if kind is None:
            continue
        low, high = np.searchsorted(owners, mine), np.searchsorted(owners, mine, side="right")
        lengths = high - low
        picked = by_owner[np.arange(lengths.sum()) + np.repeat(low - np.cumsum(lengths) + lengths, lengths)]
        position[mine] = np.arange(mine.size)
        chosen = where.pick(picked)
        copy = mix(full[picked], block_of[chosen.owner])  # alike for the neurons of a block
        sites = _sites(problem, chosen, place[picked], _first_of(copy, chosen.element), position, mine.size)
        if sites is None:
            continue
        site = next((s for s in sites if s.power == 1 and s.gain is None), sites[0])
        stem = f"{site.parameter}[{site.axis}]"
        name = stem
        while name in names:
            name += "'"
        names.add(name)
        size = int(sizes[block[run[0]]])
        told = sorted(problem.reasons[k] for k in _distinct(problem.blame[mine]) if k >= 0)
        yield ContinuousGroup(name, kind, mine.size // size, size, sites, told[0] if told else "")


def _distinct(values: np.ndarray) -> np.ndarray:
    """As np.unique, which hashes and is many times slower."""
    ordered = np.sort(values)
    return ordered[np.diff(ordered, prepend=ordered[:1] - 1) != 0]


def _first_of(labels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each the smallest value that has its label."""
    _, inverse = np.unique(labels, return_inverse=True)
    smallest = np.full(int(inverse.max()) + 1, values.max())
    np.minimum.at(smallest, inverse, values)
    return smallest[inverse]


def _told_apart(
    problem: _Problem, classes: np.ndarray, block: np.ndarray, apart: np.ndarray, full: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks whose neurons sit twice in one place, as far as is known, are taken apart: each neuron is its own."""
    where = problem.where
    of_class = np.full(problem.flags.size, -1)
    of_class[classes] = np.arange(classes.size)
    mine = of_class[where.owner]
    placed = mix(full, mine)
    ordered = np.sort(placed)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    twice = np.zeros(classes.size, dtype=bool)
    if again.size:
        twice[mine[np.isin(placed, again)]] = True
    single = np.zeros(int(block.max()) + 1, dtype=bool)
    single[block[twice]] = True
    loose = single[block]
    block = np.where(loose, int(block.max()) + 1 + np.arange(block.size), block)
    _, block = np.unique(block, return_inverse=True)
    sizes = np.bincount(block)
    return block, apart | loose | (sizes[block] == 1)


def _kind(flags: int, size: int) -> Kind | None:
    """The largest group that all limits leave; None if that is the identity alone."""
    if size == 1 or flags & Limit.APART:
        if flags & Limit.ONES:
            return None
        if flags & Limit.ISOMETRY:
            return None if flags & Limit.POSITIVE else "signs"
        return "positive scales" if flags & Limit.POSITIVE else "scales"
    if flags & Limit.ONES:
        return "rotations that keep ones"
    return "rotations" if flags & Limit.ISOMETRY else "invertible"


def _sites(
    problem: _Problem,
    where: _Occurrences,
    place: np.ndarray,
    copies_of: np.ndarray,
    position: np.ndarray,
    count: int,
) -> tuple[MapSite, ...] | None:
    """Sites with a position for each class; None if the classes do not sit alike."""
    rank = position[where.owner]
    # The copies of a class in one place in the order in which its block's copies begin.
    order = np.lexsort((where.element, copies_of, rank, place))
    made: list[tuple[int, MapSite]] = []
    for run in np.split(order, np.flatnonzero(np.diff(place[order].astype(np.uint64)) != 0) + 1):
        copies, rest = divmod(run.size, count)
        if rest or not np.array_equal(rank[run], np.repeat(np.arange(count), copies)):
            return None
        for copy in range(copies):
            chosen = run[copy::copies]
            if _distinct(where.element[chosen]).size < chosen.size:
                return None
            made.append((int(where.element[chosen[0]]), _site(problem, where, chosen)))
    return tuple(site for _, site in sorted(made, key=lambda one: one[0]))


def _site(problem: _Problem, where: _Occurrences, chosen: np.ndarray) -> MapSite:
    elements, first = where.element[chosen], chosen[0]
    axis = problem.constraints.axes[problem.axis[elements[0]]]
    gain = None
    if where.gain[first] >= 0:
        vector = problem.constraints.axes[problem.axis[where.gain[first]]]
        gain = GainSite(
            vector.parameter,
            indices(where.gain[chosen] - vector.start),
            problem.offsets[where.offset[first]],
            int(where.gain_power[first]),
        )
    return MapSite(axis.parameter, axis.axis, indices(elements - axis.start), int(where.power[first]), gain)

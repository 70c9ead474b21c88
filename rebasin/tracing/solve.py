"""From constraints to the symmetry group: who is exchangeable with whom, and which blocks move as wholes.

1. Elements tied together are one neuron. Its **signature** is a hash of everything that was recorded about it:
   where its elements sit, how they are tied (by which record), marked, and grouped. Neurons of equal signature and
   in no set are freely exchangeable.
2. A set with a single member of some signature is tied to it: where the one goes, the other goes.
3. The remaining sets (heads, norm groups) form components. A component is taken apart from the outside: a set that
   spans it is removed, what falls apart is solved on its own, and parts of equal structure may be permuted as wholes
   (a wreath product). The **key** of a part describes it up to isomorphism, so equal keys make it legal.
4. Where partitions overlap without nesting, the automorphisms of the component's quotient (its atoms and sets) are
   listed if they are few; else one family of sets is held in place and the rest is solved. That is sound, and may
   give away freedom; it is the only place that does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from .constraints import Constraints

Hash = np.ndarray
_NONE = np.zeros(0, dtype=np.int64)
_TIE, _MARK, _MEMBER, _SPAN, _UP, _DOWN, _HOLD, _ROOT = (np.uint64(k) for k in range(1, 9))


def mix(*parts: np.ndarray | np.uint64 | int) -> Hash:
    """A 64-bit hash of each row of `parts` (splitmix64 finaliser); sums of hashes stand for multisets."""
    with np.errstate(over="ignore"):
        h: np.ndarray = np.uint64(0x9E3779B97F4A7C15) * np.ones(1, dtype=np.uint64)
        for part in parts:
            h = h ^ np.asarray(part).astype(np.uint64, copy=False)
            h *= np.uint64(0xBF58476D1CE4E5B9)
            h ^= h >> np.uint64(27)
            h *= np.uint64(0x94D049BB133111EB)
            h ^= h >> np.uint64(31)
    return h


@dataclass(frozen=True, eq=False)
class Part:
    """A solved piece: a leaf of exchangeable neurons (`classes`), or children and how they may move."""

    key: tuple
    children: tuple[Part, ...] = ()
    moves: str | tuple[tuple[int, ...], ...] = "fixed"
    colour: int = 0
    classes: np.ndarray | None = None

    @property
    def first(self) -> int:
        return (
            int(self.classes[0])
            if self.classes is not None
            else min((c.first for c in self.children), default=0)
        )

    def log_size(self) -> float:
        if self.classes is not None:
            return math.lgamma(len(self.classes) + 1)
        outer = math.lgamma(len(self.children) + 1) if self.moves == "any" else 0.0
        outer = math.log(len(self.moves)) if isinstance(self.moves, tuple) else outer
        return outer + sum(c.log_size() for c in self.children)


@dataclass(frozen=True, eq=False)
class Solution:
    """`neuron[e]` is the class of element e; `slot[e]` tells its elements apart; `parts` partition the classes, but for
    those that are in no set and alone of their kind.
    """

    neuron: np.ndarray
    slot: Hash
    parts: tuple[Part, ...]


def solve(constraints: Constraints) -> Solution:
    ties = list(constraints.ties)
    while True:
        neuron = classes_of(constraints.size, ties)
        slot = _slots(constraints, neuron)
        signature = _signatures(constraints, ties, neuron, slot)
        edges = _edges(constraints, neuron, slot, signature)
        rigid = _single_members(edges, signature)
        if rigid is None:
            break
        representative = np.zeros(signature.size, dtype=np.int64)
        representative[neuron] = np.arange(neuron.size)
        ties.append((representative[rigid[0]], representative[rigid[1]]))
    whole = _solve_set(np.arange(signature.size), signature, edges, alone=False)
    return Solution(neuron, slot, whole.children)


def classes_of(size: int, ties: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The class of each element that ties join, numbered in the order of their first elements; int64 [size]."""
    labels = _components(size, *(np.concatenate([_NONE, *(pair[k] for pair in ties)]) for k in (0, 1)))
    # Number the classes by their first element, so that they are in the order of the parameters' positions.
    first = np.full(int(labels.max()) + 1 if size else 0, size, dtype=np.int64)
    np.minimum.at(first, labels, np.arange(size))
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(first.size)
    return rank[labels]


def _slots(constraints: Constraints, neuron: np.ndarray) -> Hash:
    """What tells the elements of one neuron apart: their axis or helper, their role, their order there."""
    place = np.empty(constraints.size, dtype=np.uint64)
    for number, axis in enumerate(constraints.axes):
        place[axis.start : axis.start + axis.size] = mix(number)[0]
    for number, helper in enumerate(constraints.helpers):
        place[helper.start : helper.start + helper.roles.size] = mix(
            len(constraints.axes) + number, helper.roles
        )
    order = np.lexsort((place, neuron))  # stable: equal ones stay in the order of position
    same = (neuron[order][1:] == neuron[order][:-1]) & (place[order][1:] == place[order][:-1])
    start = np.concatenate([[0], np.where(same, 0, np.arange(1, order.size))]) if order.size else order
    rank = np.empty(order.size, dtype=np.int64)
    rank[order] = np.arange(order.size) - np.maximum.accumulate(start)
    return mix(place, rank)


def _signatures(constraints: Constraints, ties: list, neuron: np.ndarray, slot: Hash) -> Hash:
    signature = np.zeros(int(neuron.max()) + 1 if neuron.size else 0, dtype=np.uint64)
    np.add.at(signature, neuron, mix(slot))
    for number, (a, b) in enumerate(ties):
        np.add.at(signature, neuron[a], mix(_TIE, number, slot[a], slot[b]))
    for number, (elements, values, _) in enumerate(constraints.marks):
        np.add.at(signature, neuron[elements], mix(_MARK, number, slot[elements], values))
    return signature


@dataclass(frozen=True, eq=False)
class Edges:
    """`member[i]` belongs to set `block[i]` (both classes); `code` tells in which way, `family` by which record."""

    member: np.ndarray
    block: np.ndarray
    code: Hash
    family: np.ndarray

    def pick(self, which: np.ndarray) -> Edges:
        """Those of a mask, or of numbers in their order."""
        return Edges(self.member[which], self.block[which], self.code[which], self.family[which])


def _edges(constraints: Constraints, neuron: np.ndarray, slot: Hash, signature: Hash) -> Edges:
    records = [(_NONE, _NONE, _NONE.astype(np.uint64), _NONE)]
    for number, (elements, blocks) in enumerate(constraints.members):
        code = mix(_MEMBER, number, slot[elements], slot[blocks])
        records.append((neuron[elements], neuron[blocks], code, np.full(elements.size, number)))
    edges = Edges(*(np.concatenate(column) for column in zip(*records, strict=True)))
    inner = edges.member == edges.block
    np.add.at(signature, edges.member[inner], edges.code[inner])
    edges = edges.pick(~inner)
    if not edges.member.size:
        return edges
    edges = edges.pick(np.lexsort((edges.block, edges.member)))
    # The same pair recorded several times is one edge.
    first = np.flatnonzero(np.diff(edges.member, prepend=-1) | np.diff(edges.block, prepend=-1))
    code, family = np.add.reduceat(edges.code, first), np.minimum.reduceat(edges.family, first)
    return Edges(edges.member[first], edges.block[first], code, family)


def _single_members(edges: Edges, signature: Hash) -> tuple[np.ndarray, np.ndarray] | None:
    """The (member, set) pairs where the set has no other member of that kind."""
    if not edges.member.size:
        return None
    kind = mix(signature[edges.member], edges.code)
    order = np.lexsort((kind, edges.block))
    block, kind = edges.block[order], kind[order]
    differs = np.concatenate([[True], (block[1:] != block[:-1]) | (kind[1:] != kind[:-1]), [True]])
    single = order[differs[:-1] & differs[1:]]
    return (edges.member[single], edges.block[single]) if single.size else None


def _leaf(colour: int, classes: np.ndarray) -> Part:
    return Part(("leaf", colour, len(classes)), colour=colour, classes=np.sort(classes))


def _fixed(children: list[Part]) -> Part:
    children = sorted(children, key=lambda c: (repr(c.key), c.first))
    return Part(("fixed", *(c.key for c in children)), tuple(children))


def _leaves(classes: np.ndarray, colour: Hash, alone: bool) -> list[Part]:
    order = np.argsort(colour, kind="stable")
    starts = np.flatnonzero(np.diff(colour[order], prepend=~colour[order[:1]]))
    sizes = np.diff(starts, append=order.size)
    kept = slice(None) if alone else sizes > 1
    runs = zip(starts[kept], sizes[kept], strict=True)
    return [_leaf(int(colour[order[low]]), classes[order[low : low + size]]) for low, size in runs]


def _components(size: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """For each of `size` nodes the number of the connected component that the edges a_i, b_i put it in."""
    graph = coo_matrix((np.ones(a.size, dtype=np.int8), (a, b)), shape=(size, size))
    return connected_components(graph, directed=False)[1]


def _solve_set(classes: np.ndarray, colour: Hash, edges: Edges, alone: bool = True) -> Part:
    """Any neurons and sets; `edges` number them 0 ... n - 1 in the order of `classes`.

    Without `alone` the neurons in no set of which there is one of its kind are left out: where nothing around moves
    they stay, and of a large network they are hundreds of thousands.
    """
    n = classes.size
    tied = np.zeros(n, dtype=bool)
    tied[edges.member] = tied[edges.block] = True
    found = _leaves(classes[~tied], colour[~tied], alone)
    if tied.any():
        component = _components(n, edges.member, edges.block)
        nodes = np.flatnonzero(tied)
        nodes = nodes[np.argsort(component[nodes], kind="stable")]
        edge_order = np.argsort(component[edges.member], kind="stable")
        starts = np.flatnonzero(np.diff(component[nodes], prepend=-1))
        edge_component = component[edges.member][edge_order]
        lows = np.searchsorted(edge_component, component[nodes[starts]])  # every component has edges
        local = np.empty(n, dtype=np.int64)
        alike: dict[tuple, list[Part]] = {}
        for run, its_edges in zip(np.split(nodes, starts[1:]), np.split(edge_order, lows[1:]), strict=True):
            mine = edges.pick(its_edges)
            local[run] = np.arange(run.size)
            inner = Edges(local[mine.member], local[mine.block], mine.code, mine.family)
            part = _solve_connected(classes[run], colour[run], inner)
            alike.setdefault(part.key, []).append(part)
        for key, parts in alike.items():
            parts.sort(key=lambda p: p.first)
            found.append(parts[0] if len(parts) == 1 else Part(("any", len(parts), key), tuple(parts), "any"))
    return _fixed(found)


def _solve_connected(classes: np.ndarray, colour: Hash, edges: Edges) -> Part:
    n = classes.size
    is_block = np.zeros(n, dtype=bool)
    is_block[edges.block] = True
    from_base = ~is_block[edges.member]
    members = np.bincount(edges.block[from_base], minlength=n)
    spanning = is_block & (members == np.count_nonzero(~is_block)) & (members > 0)
    spanning[spanning] = _interchangeable(spanning, colour, edges)
    if spanning.any():
        return _without(classes, _surroundings(colour, edges, _SPAN), edges, spanning)
    refined = _refine(colour, edges)
    _, inverse, counts = np.unique(refined, return_inverse=True, return_counts=True)
    alone = is_block & (counts[inverse] == 1)
    if alone.any():
        return _without(classes, refined, edges, alone)
    return _automorphisms(classes, refined, edges, is_block) or _hold_one_family(classes, refined, edges)


def _interchangeable(sets: np.ndarray, colour: Hash, edges: Edges) -> np.ndarray:
    """Which of these sets have each member in the same way as all others of their colour have it.

    Only such may be taken away at once: of two sets that cross (rows and columns of one product), one member may be
    the first's row and the second's column, and then moves only when the two change places.
    """
    held = np.zeros(colour.size, dtype=np.uint64)
    np.add.at(held, edges.block, mix(_ROOT, edges.code, edges.member))
    _, first, kind = np.unique(colour[sets], return_index=True, return_inverse=True)
    alike = np.ones(first.size, dtype=bool)
    alike[kind[held[sets] != held[sets][first][kind]]] = False
    return alike[kind]


def _without(classes: np.ndarray, colour: Hash, edges: Edges, fixed: np.ndarray) -> Part:
    """Sets that stay in place need not be sets any more: their members carry it in their colour."""
    return _solve_set(classes, colour, edges.pick(~fixed[edges.block]))


def _surroundings(colour: Hash, edges: Edges, salt: np.uint64) -> Hash:
    """One round of colour refinement: each node takes in what it belongs to and what belongs to it."""
    total = np.zeros(colour.size, dtype=np.uint64)
    np.add.at(total, edges.member, mix(_UP, edges.code, colour[edges.block]))
    np.add.at(total, edges.block, mix(_DOWN, edges.code, colour[edges.member]))
    return mix(salt, colour, total)


def _refine(colour: Hash, edges: Edges) -> Hash:
    count = np.unique(colour).size
    while True:
        finer = _surroundings(colour, edges, _SPAN)
        now = np.unique(finer).size
        if now == count:
            return finer
        colour, count = finer, now


def _automorphisms(classes: np.ndarray, colour: Hash, edges: Edges, is_block: np.ndarray) -> Part | None:
    """The component as atoms in a row and the orders in which they may stand, if fixing one set fixes them all."""
    n = classes.size
    belongs = np.zeros(n, dtype=np.uint64)
    np.add.at(belongs, edges.member, mix(_ROOT, edges.code, edges.block))
    kind = np.where(is_block, mix(_ROOT, np.arange(n)), mix(colour, belongs))  # sets are atoms of their own
    _, representative, atom, size = np.unique(
        kind, return_index=True, return_inverse=True, return_counts=True
    )
    if atom.max() >= 2000:
        return None
    quotient_edges = np.unique(np.stack([atom[edges.member], atom[edges.block]]), axis=1)
    code = {
        (int(a), int(b)): c for a, b, c in zip(atom[edges.member], atom[edges.block], edges.code, strict=True)
    }
    q = Edges(
        quotient_edges[0],
        quotient_edges[1],
        np.array([code[int(a), int(b)] for a, b in quotient_edges.T], dtype=np.uint64),
        np.zeros(quotient_edges.shape[1], dtype=np.int64),
    )
    base = mix(colour[representative], size)
    blocks = np.flatnonzero(is_block[representative])
    values, counts = np.unique(base[blocks], return_counts=True)
    roots = blocks[base[blocks] == values[np.lexsort((values, counts))[0]]]
    if roots.size > 64:
        return None
    orders: dict[tuple[int, ...], list[np.ndarray]] = {}
    for root in roots:
        rooted = base.copy()
        rooted[root] = mix(_ROOT, base[root])[0]
        rooted = _refine(rooted, q)
        if np.unique(rooted).size < rooted.size:
            return None
        order = np.argsort(rooted)
        orders.setdefault(tuple(int(x) for x in rooted[order]), []).append(order)
    key = min(orders)
    reference = orders[key][0]
    where = np.empty(reference.size, dtype=np.int64)
    where[reference] = np.arange(reference.size)
    children = tuple(_leaf(int(base[a]), classes[atom == a]) for a in reference)
    moves = tuple(sorted(tuple(int(x) for x in where[order]) for order in orders[key]))
    return Part(("orders", key, *(c.key for c in children)), children, moves if len(moves) > 1 else "fixed")


def _hold_one_family(classes: np.ndarray, colour: Hash, edges: Edges) -> Part:
    """Fix the order of one family of sets, the one that leaves most freedom."""
    best: Part | None = None
    for family in np.unique(edges.family)[:6]:
        blocks = np.unique(edges.block[edges.family == family])
        held = colour.copy()
        held[blocks] = mix(_HOLD, colour[blocks], np.arange(blocks.size))
        fixed = np.zeros(classes.size, dtype=bool)
        fixed[blocks] = True
        part = _without(classes, _surroundings(held, edges, _HOLD), edges, fixed)
        if best is None or part.log_size() > best.log_size():
            best = part
    assert best is not None
    return best

"""Weight matching with linear maps: the alignment that brings B's weights closest to A's.

Both endpoints are brought into their gauge first (gauge.py). What is left are permutations and orthogonal M, and

    |A - M pi(B)|^2  =  |A|^2 + |B|^2 - 2 <A, M pi(B)>,

so that the same coordinate descent as in weight matching (Ainsworth et al., section 3.2) goes on with one kind of block
more: with all else held fixed, the best M of a group is the polar factor of sum over sites of A_s B_s^T (the orthogonal
Procrustes problem, Schoenemann 1966; for maps that keep the ones in what is orthogonal to them), and heads are assigned
to each other by what the best M between them would reach, the sum of singular values. No step lowers the objective.

The start goes from the input to the output, each unit by what is settled already. The closest alignment is not yet the
one with the lowest barrier: docs/continuous.md has what each is worth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...arguments import check_range, typed
from ...errors import CheckpointError, shown
from ...spec import (
    DIAGONAL,
    Alignment,
    Branch,
    ContinuousGroup,
    Group,
    Leaf,
    MapSite,
    Node,
    Permutation,
    PermutationSpec,
    Site,
    displaced,
    to_array,
)
from ...spec.continuous import ones_complement
from ...spec.mapped import MappedState
from ...spec.permutation import moved_by
from ...types import Progress, State, is_finite, tell
from ..assignment.blocks import leaves
from ..result import MatchResult, Sweep, Update
from ..weights.costs import Choose, WeightCosts
from ..weights.endpoints import Endpoints
from ..weights.matching import weight_matching
from ..weights.nearness import arrangement
from .gauge import canonical, gain_vectors, is_gain, rows

GAIN = 1e-10
"""Of the largest objective that there could be: less than that is no gain."""

RANK = 1e-6
"""Singular values below this share of the largest tell nothing of a matrix."""


@dataclass(frozen=True)
class MapsResult(MatchResult):
    """An alignment with maps; the fields of `MatchResult` with these differences.

    `objective` and `initial_objective` are <A, M pi(B)> over all that moves, both in their gauge; the distances are
    those of the weights as they are.

    Attributes:
        alignment: what brings B to A, gauge included: `alignment.apply(state_b)`; `permutation` is its permutation.
        left_out: continuous groups without a map, and why.
        fallback: those that activations were to tell of, and that were matched by their weights, being seen nowhere.
    """

    alignment: Alignment = field(kw_only=True)
    left_out: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    fallback: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def as_alignment(self) -> Alignment:
        return self.alignment


@typed
def weight_alignment(
    spec: PermutationSpec,
    state_a: State,
    state_b: State,
    *,
    seed: int = 0,
    max_sweeps: int = 100,
    progress: Progress | None = None,
) -> MapsResult:
    """Find the permutation and the maps that bring B to A, from the weights alone.

    Both are held in memory, once more than they are given.

    Args:
        spec: the architecture's symmetries, `spec.continuous` among them.
        state_a, state_b: name -> tensor, lazy mappings too; further keys are ignored. Never changed.
        seed: of the order in which permutations are improved.
        max_sweeps: give up then, with `converged=False`.
        progress: called after each sweep with stage, step, total, objective, moved and seconds.

    Raises:
        SpecMismatchError: a tensor is missing or has another shape than the spec's.
        CheckpointError: a tensor is not floating point or has NaN or infinite values.
    """
    began = perf_counter()
    check_range(1, max_sweeps=max_sweeps)
    check_range(0, seed=seed)
    names = touched_by(spec)
    a, b = (read(spec, state, names) for state in (state_a, state_b))
    gauges = canonical(spec, a), canonical(spec, b)
    before = distance(a, b)
    pair = Pair(spec, *(dict(g.apply(s)) for g, s in zip(gauges, (a, b), strict=True)))
    initial = pair.objective
    _forward(pair)
    history = [Sweep(0, pair.objective, pair.permutation.moved())]
    converged = False
    for number in range(1, max_sweeps + 1):
        updates = tuple(_sweep(pair, seed + number))
        history.append(Sweep(number, pair.objective, pair.permutation.moved(), updates))
        seconds = perf_counter() - began
        tell(
            progress, "weight matching with maps", number, max_sweeps, objective=pair.objective,
            moved=history[-1].moved, seconds=seconds, left=None,
        )  # fmt: skip
        gained = history[-1].objective - history[-2].objective
        if gained <= GAIN * pair.scale and not any(update.moved for update in updates):
            converged = True
            break
    found = Alignment(pair.permutation, pair.maps)
    alignment = gauges[0].invert().compose(found).compose(gauges[1])
    return MapsResult(
        permutation=alignment.permutation,
        objective=history[-1].objective,
        history=tuple(history),
        converged=converged,
        seconds=perf_counter() - began,
        initial_objective=initial,
        distance_before=before,
        distance_after=distance(a, alignment.apply(b)),
        restarts=(history[-1].objective,),
        alignment=alignment,
        left_out=pair.left_out,
    )


def touched_by(spec: PermutationSpec) -> list[str]:
    """The tensors that permutations or maps act on, and those that maps are turned by."""
    names = dict.fromkeys(spec.axes)
    for group in spec.continuous:
        names |= dict.fromkeys(site.parameter for site in group.sites)
    return list(names | dict.fromkeys(gain_vectors(spec)))


def read(spec: PermutationSpec, state: State, names: list[str]) -> dict[str, Tensor]:
    """Tensors by their names in the spec, float32 or float64."""
    spec.check(state, maps=[group.name for group in spec.continuous])
    other = {target: alias for alias, target in spec.aliases.items() if alias in state}
    found = {}
    for name in names:
        tensor = state[name if name in state else other[name]].detach()
        if not tensor.is_floating_point() or not is_finite(tensor):
            why = "has NaN or infinite values" if tensor.is_floating_point() else f"is {tensor.dtype}"
            raise CheckpointError(f"Tensor {shown(name)} {why}, so that nothing can be matched by it.")
        found[name] = tensor if tensor.dtype == torch.float64 else tensor.float()
    return found


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return math.sqrt(
        math.fsum(float((b[name] - tensor).double().square().sum()) for name, tensor in a.items())
    )


class Products(Protocol):
    """A and B as far as heads and signs have to know them: products of A's with B's under what was found so far."""

    spec: PermutationSpec
    mixing: list[ContinuousGroup]

    def permute(self, index: Mapping[str, np.ndarray]) -> int: ...

    def cell_products(self, name: str, choose: Choose | None) -> np.ndarray: ...

    def products(self, group: ContinuousGroup, choose: Choose | None, every: bool = False) -> Tensor: ...


class Pair:
    """A, and B under the permutation and the maps found so far, both in their gauge.

    Attributes:
        maps: group name -> matrices that act behind `permutation`.
        mixing: continuous groups for which there is a matrix to be found; `left_out` the others and why.
        clock: how often B has changed; `changed`: when each tensor did; `looked`: when each unit was looked at last.
    """

    def __init__(self, spec: PermutationSpec, a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
        self.spec, self.a, self.b = spec, a, b
        self.clock = 0
        self.changed = dict.fromkeys(b, 0)
        self.looked: dict[str, int] = {}
        self._dots: dict[str, float] = {}
        # What is divided by gains (the shifts of norms) would decide everything where a gain is small.
        divided = {
            s.parameter for g in spec.continuous for s in g.sites if s.gain is not None and s.power == 1
        }
        self.counted = {
            n for n, t in a.items() if n not in spec.buffers and not (n in divided and t.ndim == 1)
        }
        self.permutation = spec.identity()
        self.seen = a  # A, without what the maps found so far do not determine
        self.maps: dict[str, Tensor] = {}
        self.left_out = dict(spec.stuck(a)) | dict(spec.stuck(b))
        for group in spec.continuous:
            if group.kind not in DIAGONAL and any(not self._is_one(site.gain) for site in group.sites):
                self.left_out.setdefault(group.name, "gains stand before it that no scale takes away")
        gains = gain_vectors(spec)
        self.mixing = [
            g
            for g in spec.continuous
            if g.name not in self.left_out and g.kind != "positive scales" and not is_gain(g, gains)
        ]

    def _is_one(self, gain: Any) -> bool:
        return gain is None or all(
            bool(((s[gain.parameter].double() + gain.offset - 1).abs() < 1e-4).all())
            for s in (self.a, self.b)
        )

    @property
    def objective(self) -> float:
        for name in self.counted:
            if name not in self._dots:
                self._dots[name] = float(torch.sum(self.a[name].double() * self.b[name].double()))
        return math.fsum(self._dots.values())

    @cached_property
    def scale(self) -> float:
        """The largest objective that there could be, now and later: what moves keeps its norm."""
        return math.fsum(
            float(self.a[name].double().norm() * self.b[name].double().norm()) for name in self.counted
        )

    @cached_property
    def units(self) -> _Units:
        return units_of(self)

    def change(self, tensors: Mapping[str, Tensor]) -> None:
        """Let these take B's place."""
        self.clock += 1
        self.b |= tensors
        for name in tensors:
            self.changed[name] = self.clock
            self._dots.pop(name, None)

    def is_new(self, unit: str, names: Iterable[str]) -> bool:
        """Whether one of these tensors has changed since the last look at a unit, by `done_with`."""
        since = self.looked.get(unit, -1)
        return any(self.changed[name] > since for name in names)

    def done_with(self, unit: str) -> None:
        self.looked[unit] = self.clock

    def permute(self, index: Mapping[str, np.ndarray]) -> int:
        """Move the neurons of cells, relative to where they are; returns how many."""
        moved = displaced(index.values())
        if moved:
            step = Permutation(self.spec, {**self.spec.identity().index, **index})
            touched = {site.parameter for name in index for site in self.spec.cells[name].sites}
            self.change({name: step.apply_to(name, self.b[name]) for name in touched})
            for group in self.spec.continuous:
                if group.name in self.maps and group.sites[0].parameter in touched:
                    self.maps[group.name] = moved_by(step, group, self.maps[group.name])
            self.permutation = step.compose(self.permutation)
        return moved

    def look(self, known: Mapping[str, Tensor]) -> None:
        """See A only in the parts of its axes that maps determine: group name -> a projection for each block."""
        groups = [group for group in self.spec.continuous if group.name in known]
        self.seen = dict(self.a)
        for group in groups:
            bare = replace(group, sites=tuple(replace(site, power=1, gain=None) for site in group.sites))
            names = {site.parameter for site in group.sites}
            view = MappedState([bare], known, self.spec.aliases, {n: self.seen[n] for n in names})
            self.seen |= {name: view[name] for name in names}

    def cell_products(self, name: str, choose: Choose | None) -> np.ndarray:
        """sum over a cell's sites of the products of A's and B's slices, float64 [size, size]."""
        cell = self.spec.cells[name]
        total = torch.zeros(cell.size, cell.size, dtype=torch.float64)
        for site in cell.sites:
            if site.parameter in self.counted and (choose is None or choose(site.parameter, site.axis)):
                x, y = (rows(site, s[site.parameter], cell.size)[:, 0].double() for s in (self.seen, self.b))
                total += x @ y.mT
        return total.numpy()

    def turn(self, group: ContinuousGroup, matrices: Tensor) -> None:
        """Let matrices act on what is there now."""
        names = {site.parameter for site in group.sites}
        names |= {site.gain.parameter for site in group.sites if site.gain is not None}
        view = MappedState([group], {group.name: matrices}, self.spec.aliases, {n: self.b[n] for n in names})
        self.change({name: view[name] for name in names if view.acts(name)})
        old = self.maps.get(group.name, group.identity())
        self.maps[group.name] = matrices * old if group.kind in DIAGONAL else matrices @ old

    def products(self, group: ContinuousGroup, choose: Choose | None, every: bool = False) -> Tensor:
        """sum over sites of A_s B_s^T, float64 [count, size, size]; of all blocks with all if `every`, [count, count,
        size, size]. Diagonal groups have blocks of one neuron.
        """
        count, size = (group.neurons, 1) if group.kind in DIAGONAL else (group.count, group.size)
        shape = (count, count, size, size) if every else (count, size, size)
        total = torch.zeros(shape, dtype=torch.float64)
        for site in group.sites:
            if site.parameter in self.counted and (choose is None or choose(site.parameter, site.axis)):
                x, y = (rows(site, s[site.parameter], count).double() for s in (self.seen, self.b))
                total += torch.einsum("kim,ljm->klij", x, y) if every else x @ y.mT
        return total


def procrustes(group: ContinuousGroup, products: Tensor) -> Tensor:
    """The orthogonal matrices of the group's kind with the largest <M, products>, in the group's shape."""
    if group.kind in DIAGONAL:
        return torch.where(products.reshape(-1) < 0, -1.0, 1.0).double()
    if group.kind == "rotations that keep ones":
        basis = ones_complement(group.size)
        return basis @ _polar(basis.mT @ products @ basis) @ basis.mT + 1 / group.size
    return _polar(products)


def _polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix)
    return left @ right


def best(group: ContinuousGroup, pair: Pair, choose: Choose | None = None) -> Tensor | None:
    """The best matrices by the weights, given all else; None if what is there is as good."""
    products = pair.products(group, choose)
    matrices = procrustes(group, products)
    now = products.diagonal(dim1=-2, dim2=-1).sum()
    then = (matrices[:, None, None] if group.kind in DIAGONAL else matrices).mul(products).sum()
    return matrices if float(then - now) > GAIN * float(products.norm()) else None


@dataclass(frozen=True, eq=False)
class _Heads:
    """A group of blocks that may change places as wholes, of which some are blocks of continuous groups.

    `cells[k]`: the neurons of child k by cell; `places[name][k]`: the blocks of the continuous group in it; `rest[k]`:
    the neurons that are in no such block.
    """

    group: Group
    cells: tuple[Mapping[str, np.ndarray], ...]
    places: Mapping[str, np.ndarray]
    rest: tuple[tuple[tuple[str, np.ndarray], ...], ...]

    def order(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """The index of all cells with child chosen[k] where child k was."""
        index = {cell.name: np.arange(cell.size) for cell in self.group.cells}
        for k, j in enumerate(chosen):
            for name, neurons in self.cells[k].items():
                index[name][neurons] = self.cells[j][name]
        return index


@dataclass(frozen=True, eq=False)
class _Signed:
    """Neurons that change places freely and have a sign each: `sign` has the neuron i as its number `places[i]`."""

    group: Group
    sign: ContinuousGroup
    places: np.ndarray


_Units = tuple[list[Group], list[_Heads], list[_Signed]]


def units_of(pair: Products) -> _Units:
    """The groups of permutations that maps do not contain, those whose blocks have blocks of maps in them, and those of
    neurons with a sign each.
    """
    where: dict[tuple[str, int, int], tuple[ContinuousGroup, int, int]] = {}
    for group in pair.mixing:
        for site in group.sites:
            for number, position in enumerate(to_array(site.positions)):
                where[site.parameter, site.axis, int(position)] = group, *divmod(number, group.size)
    plain: list[Group] = []
    heads: list[_Heads] = []
    signed: list[_Signed] = []
    for group in pair.spec.groups:
        tree = group.tree
        children = tree.children if isinstance(tree, Branch) and tree.moves == "any" else (tree,)
        parts = [_part(group, child, where) for child in children]
        if all(mixes is None for _, mixes, _ in parts):
            one = _signed(group, where)
            plain += [] if one else [group]
            signed += [one] if one else []
        elif len(children) > 1:
            names = {name for _, mixes, _ in parts for name in mixes or ()}
            alike = all(
                mixes is not None
                and {n: len(b) for n, b in mixes.items()}
                == {n: len(b) for n, b in (parts[0][1] or {}).items()}
                for _, mixes, _ in parts
            )
            if alike:
                places = {n: np.array([(mixes or {})[n] for _, mixes, _ in parts]) for n in names}
                heads.append(_Heads(group, tuple(p[0] for p in parts), places, tuple(p[2] for p in parts)))
    return plain, heads, signed


def _signed(
    group: Group, where: Mapping[tuple[str, int, int], tuple[ContinuousGroup, int, int]]
) -> _Signed | None:
    if not isinstance(group.tree, Leaf) or len(group.cells) != 1:
        return None
    for site in group.cells[0].sites:
        found = [where.get((site.parameter, site.axis, int(p))) for p in to_array(site.positions)]
        names = {f and f[0].name for f in found}
        if len(names) == 1 and (first := found[0]) is not None and first[0].neurons == len(found):
            return _Signed(group, first[0], np.array([f[1] for f in found if f is not None]))
    return None


def assign_signed(pair: Products, unit: _Signed, choose: Choose | None = None) -> int:
    """Bring neurons to the places where, with the better sign each, they meet A's."""
    own = {(site.parameter, site.axis) for site in unit.sign.sites}
    others: Choose = lambda p, a: (p, a) not in own and (choose is None or choose(p, a))  # noqa: E731
    total = pair.cell_products(unit.group.cells[0].name, others)
    products = pair.products(unit.sign, choose, every=True)[:, :, 0, 0].abs().numpy()
    total = total + products[np.ix_(unit.places, unit.places)]
    chosen = linear_sum_assignment(total, maximize=True)[1]
    stays = np.arange(len(chosen))
    if total[stays, chosen].sum() <= total[stays, stays].sum() * (1 + GAIN):
        return 0
    return pair.permute({unit.group.cells[0].name: chosen})


def _part(
    group: Group, child: Node, where: Mapping[tuple[str, int, int], tuple[ContinuousGroup, int, int]]
) -> tuple[dict[str, np.ndarray], dict[str, list[int]] | None, tuple[tuple[str, np.ndarray], ...]]:
    """A child's neurons by cell in the order of maps' blocks, these blocks (None: no matrix mixes any), the rest."""
    cells: dict[str, list[np.ndarray]] = {}
    blocks: dict[str, list[int]] = {}
    rest, mixed = [], False
    for leaf in leaves(child):
        cell, neurons = group.cells[leaf.cell], to_array(leaf.neurons)
        site = cell.sites[0]
        found = [where.get((site.parameter, site.axis, int(p))) for p in to_array(site.positions)[neurons]]
        known = [f for f in found if f is not None]
        if len(known) == len(found):
            order = sorted(range(len(found)), key=lambda k: known[k][1:])
            neurons = neurons[order]
            for one in known:
                mixed |= one[0].kind not in DIAGONAL
                mine = blocks.setdefault(one[0].name, [])
                mine += [one[1]] if one[1] not in mine else []
        else:
            rest.append((cell.name, neurons))
        cells.setdefault(cell.name, []).append(neurons)
    joined = {name: np.concatenate(parts) for name, parts in cells.items()}
    return joined, {n: sorted(b) for n, b in blocks.items()} if mixed else None, tuple(rest)


def assign_heads(pair: Products, heads: _Heads, choose: Choose | None = None) -> int:
    """Bring heads to the places where, each turned at best, they meet A's."""
    groups = {group.name: group for group in pair.mixing}
    count = len(heads.cells)
    total = np.zeros((count, count))
    for name, place in heads.places.items():
        values = torch.linalg.svdvals(pair.products(groups[name], choose, every=True)).sum(-1).numpy()
        for blocks in place.T:
            total += values[np.ix_(blocks, blocks)]
    for k in range(len(heads.rest[0])):
        name = heads.rest[0][k][0]
        products = pair.cell_products(name, choose)
        for i in range(count):
            for j in range(count):
                total[i, j] += products[heads.rest[i][k][1], heads.rest[j][k][1]].sum()
    chosen = linear_sum_assignment(total, maximize=True)[1]
    stays = np.arange(count)
    if total[stays, chosen].sum() <= total[stays, stays].sum() * (1 + GAIN):
        return 0
    return pair.permute(heads.order(chosen))


def _forward(pair: Pair) -> None:
    """From the input to the output: each unit by the sites of which all else is settled (see weights.initial).

    Few inputs determine few dimensions of a stream's matrix. What is written in the others is not looked at until units
    that read the stream are settled and tell more.
    """
    plain, heads, signed = pair.units
    spec = pair.spec
    mixing = {group.name: group for group in pair.mixing}
    acts: dict[tuple[str, int], set[str]] = {}
    units: dict[str, tuple[Any, list[tuple[str, int, int]]]] = {}

    def add(name: str, unit: Any, sites: Iterable[Site | MapSite]) -> None:
        chosen = [(s.parameter, s.axis, len(s.positions)) for s in sites if s.parameter in pair.counted]
        units[name] = unit, chosen
        for parameter, axis, _ in chosen:
            acts.setdefault((parameter, axis), set()).add(name)

    for group in plain:
        add("p " + group.name, group, (s for c in group.cells for s in c.sites))
    for one in heads:
        rest = [c for c in one.group.cells if any(c.name == n for parts in one.rest for n, _ in parts)]
        add(
            "h " + one.group.name,
            one,
            [*(s for n in one.places for s in mixing[n].sites), *(s for c in rest for s in c.sites)],
        )
    for one in signed:
        add("s " + one.group.name, one, one.group.cells[0].sites)
    inside = {name for one in heads for name in one.places} | {one.sign.name for one in signed}
    for group in pair.mixing:
        if group.name not in inside:
            add("m " + group.name, group, group.sites)
    done: set[str] = set()

    def settled(parameter: str, axis: int) -> bool:
        others = (other for other in range(len(spec.shapes[parameter])) if other != axis)
        return all(acts.get((parameter, other), set()) <= done for other in others)

    def share(name: str) -> float:
        known = total = 0
        for parameter, axis, count in units[name][1]:
            shape = spec.shapes[parameter]
            if len(shape) > 1:
                weights = math.prod(shape) // shape[axis] * count
                total += weights
                known += weights * settled(parameter, axis)
        return known / total if total else 0.0

    known: dict[str, Tensor] = {}
    waiting = dict.fromkeys(units)
    while waiting:
        name = max(waiting, key=share)
        del waiting[name]
        unit = units[name][0]
        choose = settled if share(name) else None
        turned: list[ContinuousGroup] = []
        if isinstance(unit, Group):
            own = PermutationSpec((unit,), spec.shapes, spec.buffers, spec.aliases)
            costs = WeightCosts(Endpoints(own, pair.seen, pair.b), None, choose)
            pair.permute(dict(arrangement(costs, unit)))
        elif isinstance(unit, _Signed):
            assign_signed(pair, unit, choose)
            turned = [unit.sign]
        elif isinstance(unit, _Heads):
            assign_heads(pair, unit, choose)
            turned = [mixing[n] for n in unit.places]
        else:
            turned = [unit]
        done.add(name)
        for group in [*turned, *(mixing[n] for n in known if n not in {g.name for g in turned})]:
            matrices = best(group, pair, settled if choose or group not in turned else None)
            if matrices is not None:
                pair.turn(group, matrices)
        for group in turned:
            if group.kind not in DIAGONAL and group.name not in known:
                known[group.name] = group.identity()
        known = {n: p for n in known if (p := _determined(mixing[n], pair, settled)) is not None}
        pair.look(known)
    pair.look({})


def _determined(group: ContinuousGroup, pair: Pair, choose: Choose) -> Tensor | None:
    """The projection onto what the sites looked at tell of a group's matrices; None if that is all."""
    left, values, _ = torch.linalg.svd(pair.products(group, choose))
    told = values > RANK * values.amax(-1, keepdim=True)
    enough = group.size - (group.kind == "rotations that keep ones")
    if bool((told.sum(-1) >= enough).all()):
        return None
    projection = left * told[..., None, :] @ left.mT
    if group.kind == "rotations that keep ones":  # these are known to stay
        ones = torch.full_like(projection, 1 / group.size)
        projection = projection - projection @ ones
        projection = (projection + projection.mT) / 2 + ones
    return projection


def _sweep(pair: Pair, seed: int) -> Iterator[Update]:
    """Every unit once, given all others; none of which nothing has changed since the last look at it."""
    plain, heads, signed = pair.units
    mixing = {group.name: group for group in pair.mixing}

    def turn(groups: Iterable[ContinuousGroup]) -> None:
        for group in groups:
            unit = "m " + group.name
            if pair.is_new(unit, {site.parameter for site in group.sites}):
                matrices = best(group, pair)
                if matrices is not None:
                    pair.turn(group, matrices)
                pair.done_with(unit)

    def is_new(unit: str, group: Group, maps: Iterable[ContinuousGroup] = ()) -> bool:
        names = {site.parameter for cell in group.cells for site in cell.sites}
        return pair.is_new(unit, names | {site.parameter for one in maps for site in one.sites})

    before = pair.objective
    turn(pair.mixing)
    yield Update("maps", pair.objective - before, 0)
    for one in heads:
        own = [mixing[name] for name in one.places]
        if is_new(unit := "h " + one.group.name, one.group, own):
            before = pair.objective
            moved = assign_heads(pair, one)
            pair.done_with(unit)
            if moved:
                turn(own)
                yield Update(one.group.name, pair.objective - before, moved)
    for one in signed:
        if is_new(unit := "s " + one.group.name, one.group, [one.sign]):
            before = pair.objective
            moved = assign_signed(pair, one)
            pair.done_with(unit)
            if moved:
                turn([one.sign])
                yield Update(one.group.name, pair.objective - before, moved)
    if new := [group for group in plain if is_new("p " + group.name, group)]:
        part = PermutationSpec(tuple(new), pair.spec.shapes, pair.spec.buffers, pair.spec.aliases)
        found = weight_matching(part, pair.a, pair.b, init="identity", seed=seed)
        gained = found.objective - found.initial_objective
        moved = pair.permute(found.permutation.index)
        for group in new:
            pair.done_with("p " + group.name)
        if moved:
            yield Update("permutations", gained, moved)

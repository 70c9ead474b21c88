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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...arguments import Count, Seed, typed
from ...errors import CheckpointError, shown
from ...spec import (
    DIAGONAL,
    Alignment,
    Cell,
    ContinuousGroup,
    Group,
    Indices,
    Leaf,
    Permutation,
    PermutationSpec,
    Site,
    displaced,
    to_array,
)
from ...spec.continuous import ones_complement
from ...spec.mapped import MappedState
from ...spec.permutation import moved_by
from ...types import Progress, State, brief, is_finite, tell
from ..assignment.blocks import Costs, assign, independent
from ..result import MatchResult, Sweep, Update
from ..weights.costs import Choose, WeightCosts
from ..weights.endpoints import Endpoints
from ..weights.matching import weight_matching
from ..weights.nearness import arrangement
from .gauge import canonical, closest_scales, gain_vectors, is_gain, rows, sign_vector, undetermined

GAIN = 1e-10
"""Of the largest objective that there could be: less than that is no gain."""

RANK = 1e-6
"""Singular values below this share of the largest tell nothing of a matrix."""


@brief
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
    seed: Seed = 0,
    max_sweeps: Count = 100,
    progress: Progress | None = None,
) -> MapsResult:
    """Find the permutation and the maps that bring B to A, from the weights alone.

    Both are held in memory, once more than they are given. Never further from A than `weight_matching`, or than B is.

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
    names = touched_by(spec)
    a, b = (read(spec, state, names) for state in (state_a, state_b))
    before = distance(spec, a, b)

    def tell_sweep(number: int, sweep: Sweep) -> None:
        seconds = perf_counter() - began
        tell(
            progress, "weight matching with maps", number, max_sweeps, objective=sweep.objective,
            moved=sweep.moved, seconds=seconds, left=None,
        )  # fmt: skip

    found = _descended(spec, a, b, seed, max_sweeps, tell_sweep)
    initial = found.initial
    if found.distance:
        # What the forward start misses may be a permutation that needs no maps: begin there, too.
        start = weight_matching(spec, a, b, seed=seed).permutation
        plain = distance(spec, a, start.apply(b))
        if plain < found.distance:
            found = _descended(spec, a, dict(start.apply(b)), seed, max_sweeps, tell_sweep, forward=False)
            found = replace(found, alignment=found.alignment.compose(Alignment.of(start)), initial=initial)
            if plain < found.distance:
                found = replace(found, alignment=Alignment.of(start), distance=plain)
    if before < found.distance:
        found = replace(found, alignment=Alignment.of(spec.identity()), distance=before)
    return MapsResult(
        permutation=found.alignment.permutation,
        objective=found.history[-1].objective,
        history=found.history,
        converged=found.converged,
        seconds=perf_counter() - began,
        initial_objective=found.initial,
        distance_before=before,
        distance_after=found.distance,
        restarts=(found.history[-1].objective,),
        alignment=found.alignment,
        left_out=found.left_out,
    )


@dataclass(frozen=True)
class _Descended:
    """What a descent ends at."""

    alignment: Alignment
    history: tuple[Sweep, ...]
    converged: bool
    initial: float
    distance: float
    left_out: Mapping[str, str]


def _descended(
    spec: PermutationSpec,
    a: dict[str, Tensor],
    b: dict[str, Tensor],
    seed: int,
    max_sweeps: int,
    told: Callable[[int, Sweep], None],
    forward: bool = True,
) -> _Descended:
    """Coordinate descent from the forward start, or from B as it is."""
    unknown = undetermined(spec, a) | undetermined(spec, b)
    gauges = canonical(spec, a, unknown), canonical(spec, b, unknown)
    pair = Pair(spec, dict(gauges[0].apply(a)), dict(gauges[1].apply(b)), unknown)
    initial = pair.objective
    if forward:
        _forward(pair)
    history = [Sweep(0, pair.objective, pair.permutation.moved())]
    converged = False
    for number in range(1, max_sweeps + 1):
        updates = tuple(_sweep(pair, seed + number))
        history.append(Sweep(number, pair.objective, pair.permutation.moved(), updates))
        told(number, history[-1])
        gained = history[-1].objective - history[-2].objective
        if gained <= GAIN * pair.scale and not any(update.moved for update in updates):
            converged = True
            break
    found = Alignment(pair.permutation, pair.maps)
    alignment = _rescaled(spec, a, b, gauges[0].invert().compose(found).compose(gauges[1]))
    left = distance(spec, a, alignment.apply(b))
    return _Descended(alignment, tuple(history), converged, initial, left, pair.left_out)


def _rescaled(
    spec: PermutationSpec, a: dict[str, Tensor], b: dict[str, Tensor], alignment: Alignment
) -> Alignment:
    """The gauge balances scales of A and of B each by itself; of positive ones the closest are known in closed form."""
    groups = [group for group in spec.continuous if group.kind == "positive scales"]
    if not groups:
        return alignment
    moved = alignment.apply(b)
    for _ in range(ROUNDS):
        for group in groups:
            scales = closest_scales(group, a, moved)
            step = Alignment(spec.identity(), {group.name: scales})
            names = {site.parameter for site in group.sites}
            view = MappedState([group], step.maps, spec.aliases, {name: moved[name] for name in names})
            moved |= {name: view[name] for name in names}
            alignment = step.compose(alignment)
    return alignment


ROUNDS = 3
"""Over all groups of positive scales, each given all others."""


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


def distance(spec: PermutationSpec, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """|A - B| over the weights; buffers do not count, as in weight matching."""
    names = (name for name in a if name not in spec.buffers)
    return math.sqrt(math.fsum(float((b[name] - a[name]).double().square().sum()) for name in names))


class Products(Protocol):
    """A and B as far as heads and signs have to know them: products of A's with B's under what was found so far."""

    spec: PermutationSpec
    mixing: list[ContinuousGroup]
    where: Where

    def permute(self, index: Mapping[str, np.ndarray]) -> int: ...

    def site_products(self, cell: Cell, sites: Sequence[Site]) -> Tensor: ...

    def products(self, group: ContinuousGroup, choose: Choose | None, every: bool = False) -> Tensor: ...


class Pair:
    """A, and B under the permutation and the maps found so far, both in their gauge.

    Attributes:
        maps: group name -> matrices that act behind `permutation`.
        unknown (given): groups whose matrices the weights do not determine, and why.
        mixing: continuous groups for which there is a matrix to be found; `left_out` the others and why.
        clock: how often B has changed; `changed`: when each tensor did; `looked`: when each unit was looked at last.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        a: dict[str, Tensor],
        b: dict[str, Tensor],
        unknown: Mapping[str, str] | None = None,
    ) -> None:
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
        self.left_out = dict(spec.stuck(a)) | dict(spec.stuck(b)) | dict(unknown or {})
        for group in spec.continuous:
            if group.kind not in DIAGONAL and any(not self._is_one(site.gain) for site in group.sites):
                self.left_out.setdefault(group.name, "gains stand before it that no scale takes away")
        gains = gain_vectors(spec)
        self.mixing = [
            g
            for g in spec.continuous
            if g.name not in self.left_out
            and g.kind != "positive scales"
            and not is_gain(g, gains)
            and sign_vector(g, spec) is None
        ]
        self.where: Where = where_of(self.mixing)

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
    def units(self) -> tuple[list[Group], list[Mixed]]:
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

    def site_products(self, cell: Cell, sites: Sequence[Site]) -> Tensor:
        """sum over some of a cell's sites of the products of A's and B's slices, float64 [size, size]."""
        total = torch.zeros(cell.size, cell.size, dtype=torch.float64)
        for site in sites:
            if site.parameter in self.counted:
                x, y = (rows(site, s[site.parameter], cell.size)[:, 0].double() for s in (self.seen, self.b))
                total += x @ y.mT
        return total

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


def improve(pair: Pair, group: ContinuousGroup) -> None:
    """Turn a group to its best, given all else; not at all if that loses.

    Where a map acts on both axes of a matrix what it gains is no inner product with it, so that step may lose: then it
    is tried by the other tensors alone.
    """
    twice = {site.parameter for site in group.sites if _both(group, site.parameter)}
    for choose in (None, lambda parameter, axis: parameter not in twice) if twice else (None,):
        matrices = best(group, pair, choose)
        if matrices is None:
            return
        names = {site.parameter for site in group.sites}
        before, tensors, old = pair.objective, {n: pair.b[n] for n in names}, pair.maps.get(group.name)
        pair.turn(group, matrices)
        if not twice or pair.objective > before:
            return
        pair.change(tensors)
        if old is None:
            del pair.maps[group.name]
        else:
            pair.maps[group.name] = old


def _both(group: ContinuousGroup, parameter: str) -> bool:
    """Whether it acts on more than one axis of a parameter."""
    return len({site.axis for site in group.sites if site.parameter == parameter}) > 1


Where = Mapping[tuple[str, int, int], tuple[ContinuousGroup, int, int]]
"""(parameter, axis, position) -> the continuous group that acts there, which of its blocks, and which neuron of it."""


@dataclass(frozen=True, eq=False)
class Mixed:
    """A group of which some neurons are mixed by maps, or have signs: `maps` are the continuous groups in it."""

    group: Group
    maps: tuple[ContinuousGroup, ...]


def where_of(mixing: Iterable[ContinuousGroup]) -> Where:
    return {
        (site.parameter, site.axis, int(position)): (group, *divmod(number, group.size))
        for group in mixing
        for site in group.sites
        for number, position in enumerate(to_array(site.positions))
    }


def units_of(pair: Products) -> tuple[list[Group], list[Mixed]]:
    """The groups whose neurons no map touches, and those with something to arrange beside or around maps."""
    plain: list[Group] = []
    mixed: list[Mixed] = []
    for group in pair.spec.groups:
        maps = {
            found[0].name: found[0]
            for cell in group.cells
            for site in cell.sites
            for p in to_array(site.positions)
            if (found := pair.where.get((site.parameter, site.axis, int(p)))) is not None
        }
        if not maps:
            plain.append(group)
        elif not all(
            isinstance(unit, Leaf) and blocks_of(pair.where, group.cells[unit.cell], unit.neurons) is not None
            for unit in independent(group.tree)
        ):
            mixed.append(Mixed(group, tuple(maps.values())))
    return plain, mixed


def blocks_of(where: Where, cell: Cell, neurons: Indices) -> list[tuple[ContinuousGroup, int, int]] | None:
    """The place of each neuron in the maps that mix it with others; None unless all of them are mixed."""
    for site in cell.sites:
        positions = to_array(site.positions)[to_array(neurons)]
        found = [where.get((site.parameter, site.axis, int(p))) for p in positions]
        known = [f for f in found if f is not None and f[0].kind not in DIAGONAL]
        if len(known) == len(found):
            return known
    return None


class MapCosts(Costs):
    """What arrangements gain where maps are chosen at best behind them: of blocks that maps mix the sum of singular
    values, of neurons with signs the absolute value of what they gain at the places that a sign acts on together.
    """

    def __init__(self, pair: Products, group: Group, choose: Choose | None = None) -> None:
        self.pair, self.choose = pair, choose
        self.cells = {cell.name: cell for cell in group.cells}
        self._matrices: dict[str, Tensor] = {}
        self._values: dict[str, np.ndarray] = {}
        self._counted: dict[tuple[str, int], str] = {}

    def block(self, cell: str, neurons: Indices) -> Tensor:
        if cell not in self._matrices:
            self._matrices[cell] = self._matrix(self.cells[cell])
        chosen = torch.from_numpy(to_array(neurons))
        return self._matrices[cell][chosen[:, None], chosen]

    def _matrix(self, cell: Cell) -> Tensor:
        together: dict[tuple[str, tuple[int, ...]] | None, list[Site]] = {}
        for site in cell.sites:
            if self.choose is None or self.choose(site.parameter, site.axis):
                found = [
                    self.pair.where.get((site.parameter, site.axis, int(p))) for p in to_array(site.positions)
                ]
                known = [f for f in found if f is not None and f[0].kind in DIAGONAL]
                signed = len(known) == len(found) and len({f[0].name for f in known}) == 1
                key = (known[0][0].name, tuple(f[1] for f in known)) if signed else None
                together.setdefault(key, []).append(site)
        total = torch.zeros(cell.size, cell.size, dtype=torch.float64)
        for key, sites in together.items():
            products = self.pair.site_products(cell, sites)
            total += products if key is None else products.abs()
        return total

    def mixed(self, cell: str, leaves: Sequence[Indices]) -> tuple[list[np.ndarray], np.ndarray] | None:
        order: list[np.ndarray] = []
        blocks: list[list[tuple[str, int]]] = []
        for neurons in leaves:
            found = blocks_of(self.pair.where, self.cells[cell], neurons)
            if found is None:
                return None
            keys = [(one.name, block, number) for one, block, number in found]
            ranks = sorted(range(len(keys)), key=keys.__getitem__)
            order.append(to_array(neurons)[ranks])
            whole = dict.fromkeys((found[k][0].name, found[k][1]) for k in ranks)
            sizes = {g.name: g.size for g, *_ in found}
            if sum(sizes[name] for name, _ in whole) != len(found):  # a map of more than this leaf: it stays
                return [to_array(n) for n in leaves], np.zeros((len(leaves), len(leaves)))
            blocks.append(list(whole))
        values = np.zeros((len(leaves), len(leaves)))
        for k, (name, block) in enumerate(blocks[0]):
            if self._counted.setdefault((name, block), cell) == cell:
                own = np.array([b[k][1] for b in blocks])
                values += self._of(name)[np.ix_(own, own)]
        return order, values

    def _of(self, name: str) -> np.ndarray:
        """The sums of singular values of all blocks with all, [count, count]."""
        if name not in self._values:
            group = next(group for group in self.pair.mixing if group.name == name)
            products = self.pair.products(group, self.choose, every=True)
            self._values[name] = torch.linalg.svdvals(products).sum(-1).numpy()
        return self._values[name]


def arrange(pair: Products, unit: Mixed, choose: Choose | None = None) -> int:
    """Bring neurons and blocks to the places where, each turned at best, they meet A's; returns how many move."""
    return pair.permute(assign(unit.group, MapCosts(pair, unit.group, choose)).index)


def _forward(pair: Pair) -> None:
    """From the input to the output: each unit by the sites of which all else is settled (see weights.initial).

    Few inputs determine few dimensions of a stream's matrix. What is written in the others is not looked at until units
    that read the stream are settled and tell more.
    """
    plain, mixed = pair.units
    spec = pair.spec
    mixing = {group.name: group for group in pair.mixing}
    acts: dict[tuple[str, int], set[str]] = {}
    units: dict[str, tuple[Any, list[tuple[str, int, int]]]] = {}

    def add(name: str, unit: Any, sites: Iterable[tuple[str, int, int]]) -> None:
        chosen = [site for site in sites if site[0] in pair.counted]
        units[name] = unit, chosen
        for parameter, axis, _ in chosen:
            acts.setdefault((parameter, axis), set()).add(name)

    for group in plain:
        add(
            "p " + group.name,
            group,
            ((s.parameter, s.axis, len(s.positions)) for c in group.cells for s in c.sites),
        )
    for one in mixed:
        sites = dict.fromkeys((s.parameter, s.axis, len(s.positions)) for g in one.maps for s in g.sites)
        sites |= dict.fromkeys(
            (s.parameter, s.axis, len(s.positions)) for c in one.group.cells for s in c.sites
        )
        add("h " + one.group.name, one, sites)
    inside = {group.name for one in mixed for group in one.maps}
    for group in pair.mixing:
        if group.name not in inside:
            add("m " + group.name, group, ((s.parameter, s.axis, len(s.positions)) for s in group.sites))
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
        elif isinstance(unit, Mixed):
            arrange(pair, unit, choose)
            turned = list(unit.maps)
        else:
            turned = [unit]
        # Before its own axes count as settled: what a map that acts on both axes of a matrix gains is no product.
        for group in turned:
            if (matrices := best(group, pair, choose)) is not None:
                pair.turn(group, matrices)
        done.add(name)
        for group in (mixing[n] for n in known if n not in {g.name for g in turned}):
            if (
                matrices := best(group, pair, lambda p, a, g=group: settled(p, a) and not _both(g, p))
            ) is not None:
                pair.turn(group, matrices)
        for group in turned:
            if group.kind not in DIAGONAL and group.name not in known:
                known[group.name] = group.identity()
        known = {
            n: p
            for n in known
            if (
                p := _determined(mixing[n], pair, lambda q, a, g=mixing[n]: settled(q, a) and not _both(g, q))
            )
            is not None
        }
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
    plain, mixed = pair.units

    def turn(groups: Iterable[ContinuousGroup]) -> None:
        for group in groups:
            unit = "m " + group.name
            if pair.is_new(unit, {site.parameter for site in group.sites}):
                improve(pair, group)
                pair.done_with(unit)

    def is_new(unit: str, group: Group, maps: Iterable[ContinuousGroup] = ()) -> bool:
        names = {site.parameter for cell in group.cells for site in cell.sites}
        return pair.is_new(unit, names | {site.parameter for one in maps for site in one.sites})

    before = pair.objective
    turn(pair.mixing)
    yield Update("maps", pair.objective - before, 0)
    for one in mixed:
        if is_new(unit := "h " + one.group.name, one.group, one.maps):
            before = pair.objective
            moved = arrange(pair, one)
            pair.done_with(unit)
            if moved:
                turn(one.maps)
                yield Update(one.group.name, pair.objective - before, moved)
    if new := [group for group in plain if is_new("p " + group.name, group)]:
        part = PermutationSpec(tuple(new), pair.spec.shapes, pair.spec.buffers, pair.spec.aliases)
        found = weight_matching(part, pair.a, pair.b, init="identity", seed=seed, normalize="paper")
        gained = found.objective - found.initial_objective
        moved = pair.permute(found.permutation.index)
        for group in new:
            pair.done_with("p " + group.name)
        if moved:
            yield Update("permutations", gained, moved)

"""Activation matching with linear maps: under them B's streams and heads do what A's do on the same data.

Both endpoints are brought into their gauge first (gauge.py), so that the maps that are left are orthogonal. Of neurons
that no map mixes the permutation is that of activation matching (Ainsworth et al., section 3.1). Where a map mixes
them, with activations z_A and z_B where the stream is written and read bare (not behind the gains of a norm), minimise

    E |z_A - M z_B|^2,      that is, maximise <M, E[z_A z_B^T]>:

the orthogonal Procrustes problem (Schoenemann 1966), each place with its sum divided by the largest that it could be.
Heads are assigned to each other by what the best M between them would reach, the sum of singular values. Groups that
are bare at no module that is called (what RoPE turns) follow by the weights, given all others.

Closeness is not what lowers a barrier (docs/continuous.md): this is a start, and a yardstick for what is learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...arguments import Seed, typed
from ...objectives import LossFunction, Objective
from ...spec import (
    DIAGONAL,
    Alignment,
    Cell,
    ContinuousGroup,
    Permutation,
    PermutationSpec,
    Site,
    displaced,
    to_array,
)
from ...tensors.memory import duplicate
from ...tensors.modules import Forward
from ...tensors.moments import Moments
from ...tensors.places import Place, known_places, owner_of
from ...types import Progress
from ..activations.matching import match_statistics
from ..activations.statistics import TOKENS, ActivationStatistics, Precision, activation_statistics
from ..result import Sweep
from ..weights.costs import Choose
from .gauge import canonical, undetermined
from .matching import (
    MapsResult,
    Pair,
    arrange,
    best,
    distance,
    procrustes,
    read,
    touched_by,
    units_of,
)


@typed
def activation_alignment(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Sequence[Any],
    *,
    tokens: int | None = TOKENS,
    objective: Objective | LossFunction | None = None,
    forward: Forward | None = None,
    seed: Seed = 0,
    precision: Precision | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> MapsResult:
    """Find the permutation and the maps that bring B to A by what both do on the same data.

    Models are left as they were; two copies of them are in memory.

    Args:
        spec: the architecture's symmetries, `spec.continuous` among them.
        model_a, model_b: two models of that architecture, of any floating point type.
        batches, tokens, objective, forward, precision, device: see `activation_matching`.
        seed: of the positions that are looked at.
        progress: called before the first and after each batch.

    Raises:
        SpecMismatchError: a model is not of the architecture of `spec`, or the two compute differently.
        DataError: there are no batches, or one gives NaN or infinite activations.
        ConfigError: an option does not fit.
    """
    began = perf_counter()
    options: dict[str, Any] = {
        "tokens": tokens, "objective": objective, "forward": forward, "seed": seed, "precision": precision,
        "device": device, "progress": progress,
    }  # fmt: skip
    a, b = (read(spec, model.state_dict(), touched_by(spec)) for model in (model_a, model_b))
    unknown = undetermined(spec, a) | undetermined(spec, b)
    gauges = canonical(spec, a, unknown), canonical(spec, b, unknown)
    moved = _moved(model_a, gauges[0]), _moved(model_b, gauges[1])
    statistics = activation_statistics(spec, moved[0], moved[1], batches, reads="both", **options)
    pair = Pair(spec, dict(gauges[0].apply(a)), dict(gauges[1].apply(b)), unknown)
    seen = _Seen(pair, statistics, model_a)
    before = seen.objective
    plain = match_statistics(statistics, pair.a, pair.b)
    unmixed, mixed = units_of(seen)
    cells = [cell.name for group in unmixed for cell in group.cells]
    seen.permute({name: plain.permutation.index[name] for name in cells})
    for one in mixed:
        arrange(seen, one)
    bare = [group for group in seen.mixing if group not in seen.unseen]
    maps = {group.name: procrustes(group, seen.products(group)) for group in bare}
    reached = sum(_inner(group, maps[group.name], seen.products(group)) for group in bare)
    pair.permute(seen.permutation.index)
    for group in bare:
        pair.turn(group, maps[group.name])
    for group in seen.unseen:
        if (matrices := best(group, pair)) is not None:
            pair.turn(group, matrices)
    found = Alignment(pair.permutation, pair.maps)
    alignment = gauges[0].invert().compose(found).compose(gauges[1])
    seconds = perf_counter() - began
    return MapsResult(
        permutation=alignment.permutation,
        objective=reached,
        history=(Sweep(0, before, 0), Sweep(1, reached, alignment.moved(), (), seconds)),
        converged=True,
        seconds=seconds,
        initial_objective=before,
        distance_before=distance(spec, a, b),
        distance_after=distance(spec, a, alignment.apply(b)),
        restarts=(reached,),
        alignment=alignment,
        left_out=pair.left_out,
        fallback=tuple(group.name for group in seen.unseen),
    )


class _Seen:
    """What `Pair` tells of weights, told of activations: products of A's with B's under the permutation so far.

    Attributes:
        mixing: the continuous groups with a matrix to be found; `unseen` those whose neurons appear bare nowhere, of
            which all products are zero.
    """

    def __init__(self, pair: Pair, statistics: ActivationStatistics, model: nn.Module) -> None:
        self.spec, self.statistics = pair.spec, statistics
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self.permutation = pair.spec.identity()
        self._places = {group.name: list(_places(group, statistics, self._modules)) for group in pair.mixing}
        self.mixing, self.where = pair.mixing, pair.where
        self.unseen = [group for group in pair.mixing if not self._places[group.name]]

    @property
    def objective(self) -> float:
        return sum(_inner(group, group.identity(), self.products(group)) for group in self.mixing)

    def permute(self, index: Mapping[str, np.ndarray]) -> int:
        """Move the neurons of cells, relative to where they are; returns how many."""
        step = Permutation(self.spec, {**self.spec.identity().index, **index})
        self.permutation = step.compose(self.permutation)
        return displaced(index.values())

    def products(self, group: ContinuousGroup, choose: Choose | None = None, every: bool = False) -> Tensor:
        """sum over places of E[z_A z_B^T], float64 [count, size, size]; of all blocks with all if `every`, [count,
        count, size, size]. Diagonal groups have blocks of one neuron.
        """
        count, size = (group.neurons, 1) if group.kind in DIAGONAL else (group.count, group.size)
        total = torch.zeros(count, size, count, size, dtype=torch.float64)
        for cell, order, moments in self._places[group.name]:
            cross = moments.statistic("covariance").cpu()[order]
            cross = cross[:, torch.from_numpy(self.permutation.index[cell])[order]]
            total += cross.reshape(count, size, count, size) / (moments.largest("covariance") or 1.0)
        every_block = total.permute(0, 2, 1, 3)
        return every_block if every else every_block.diagonal(dim1=0, dim2=1).permute(2, 0, 1).contiguous()

    def site_products(self, cell: Cell, sites: Sequence[Site]) -> Tensor:
        """The sum of the correlations of a cell's neurons at some of its sites, float64 [size, size].

        A norm passes signs on: no map acts on its gains, but what is seen beside them has the stream's sign, if any.
        """
        total = torch.zeros(cell.size, cell.size, dtype=torch.float64)
        signed = any(self._sign_at(site) for site in cell.sites)
        for site in sites:
            passed_on = signed and len(self.spec.shapes[site.parameter]) == 1 and not self._sign_at(site)
            for moments in _seen_at(cell.name, site, self.statistics, self._modules):
                pearson = moments.statistic("pearson").cpu()
                total += pearson.abs() if passed_on else pearson
        return total[:, torch.from_numpy(self.permutation.index[cell.name])]

    def _sign_at(self, site: Site) -> bool:
        first = self.where.get((site.parameter, site.axis, int(to_array(site.positions)[0])))
        return first is not None and first[0].kind in DIAGONAL


def _places(
    group: ContinuousGroup, statistics: ActivationStatistics, modules: Mapping[str, nn.Module]
) -> Iterable[tuple[str, Tensor, Moments]]:
    """Where a group's neurons are written or read bare: a cell, the cell's number of each, and the moments there."""
    for site in group.sites:
        if site.gain is None:
            for cell, other in statistics.spec.axes.get(site.parameter, {}).get(site.axis, ()):
                number = {int(p): k for k, p in enumerate(to_array(other.positions))}
                order = [number.get(int(p), -1) for p in to_array(site.positions)]
                if -1 not in order:
                    for moments in _seen_at(cell, other, statistics, modules):
                        yield cell, torch.tensor(order), moments


def _seen_at(
    cell: str, site: Site, statistics: ActivationStatistics, modules: Mapping[str, nn.Module]
) -> Iterable[Moments]:
    """The moments of a cell where a module shows the neurons of one of its sites. What a bias is added to is written
    where its weight is.
    """
    module, own = owner_of(site.parameter, modules)
    known = known_places(modules[module])
    places = (Place("output", -1),) if known is None else known.get((own, site.axis), ())
    for place in places if own != "bias" else ():
        positions = to_array(site.positions) - place.offset
        for seen, moments in zip(statistics.hook_sites, statistics.moments, strict=True):
            if (seen.cell, seen.module, seen.where) == (cell, module, place.where) and any(
                np.array_equal(to_array(p), positions) for p in seen.positions
            ):
                yield moments


def _inner(group: ContinuousGroup, maps: Tensor, products: Tensor) -> float:
    matrices = maps[:, None, None] if group.kind in DIAGONAL else maps
    return float((matrices * products).sum())


def _moved(model: nn.Module, gauge: Alignment) -> nn.Module:
    """A copy of a model under an alignment."""
    other = duplicate(model)
    other.load_state_dict(gauge.apply(model.state_dict()))
    return other

"""Do learned maps bring the residual streams of two models together, or keep them apart?

At the midpoint a reader (W_A + W_B)/2 meets (z_A + z_B)/2, and what comes of it is W_A z_A + W_B z_B and two crossed
terms, W_A z_B + W_B z_A, all over 4. They do no harm if both models speak alike, so that W_A z_B is W_B z_B, or if
they do not hear each other, so that it is nothing. For each stream that may be rotated these are measured under the
permutation, under the learned maps, and under the rotation that brings the streams closest (orthogonal Procrustes):

    correlation   sum(z_A z_B) / (|z_A| |z_B|)
    crossed       |W_A z_B, W_B z_A| / |W_A z_A, W_B z_B|
    agreed        the cosine between (W_A z_B, W_B z_A) and (W_B z_B, W_A z_A)

and how many dimensions the streams fill. Used by `experiments.learned_maps --study streams`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from rich.table import Table
from torch import Tensor, nn

from rebasin import Alignment, PermutationSpec
from rebasin.spec import ContinuousGroup, MapSite, to_array

ROTATIONS = ("rotations", "rotations that keep ones")
State = Mapping[str, Tensor]
MOST = 2000  # places of a batch that are looked at


@dataclass(frozen=True)
class Meeting:
    """How A and B meet in a stream, see above; `leaving` is `crossed` of the layers that read it bare."""

    correlation: float
    crossed: float
    agreed: float
    leaving: float


@dataclass(frozen=True)
class Stream:
    """One stream, at the norms that read it.

    Attributes:
        name, size: of the continuous group.
        permuted, learned, closest: how A and B meet there under the permutation, the learned maps, and the rotation
            behind the permutation that brings the streams closest.
        rank_a, rank_b: the effective number of dimensions, (sum of variances)^2 / sum of their squares.
    """

    name: str
    size: int
    permuted: Meeting
    learned: Meeting
    closest: Meeting
    rank_a: float
    rank_b: float


def streams(
    spec: PermutationSpec,
    model: nn.Module,
    a: State,
    b: State,
    learned: Alignment,
    run: Callable[[nn.Module], object],
) -> list[Stream]:
    """Of each rotated stream that norms with gains read; `run` calls the model on the data."""
    groups = [
        group
        for group in spec.continuous
        if group.kind in ROTATIONS and group.count == 1 and any(site.gain is not None for site in group.sites)
    ]
    states = [a, Alignment.of(learned.permutation).apply(b), learned.apply(b)]
    places = {_place(site) for group in groups for site in group.sites if site.power == -1}
    seen = [_seen(model, state, places, run) for state in states]
    found = []
    for group in groups:
        at = [_side(group, state, one) for state, one in zip(states, seen, strict=True)]
        own, permuted, moved = at
        norms = {_place(site) for site in group.sites if site.gain is not None}
        z_a, z_b = (_flat({name: side.streams[name] for name in norms}) for side in (own, permuted))
        left, _, right = torch.linalg.svd(z_a.T @ z_b)
        closest = permuted.turned(left @ right)
        permuted, moved, closest = (_meet(own, side, norms) for side in (permuted, moved, closest))
        found.append(Stream(group.name, group.size, permuted, moved, closest, _rank(z_a), _rank(z_b)))
    return found


@dataclass(frozen=True)
class _Side:
    """One model's: place -> the stream there, [places in the data, n], and what reads it, [outputs, n].

    Places are norms, where it is what they give without gains, which are folded into the readers, and layers that read
    it bare.
    """

    streams: dict[str, Tensor]
    readers: dict[str, Tensor]

    def turned(self, rotation: Tensor) -> _Side:
        return _Side(
            *({name: x @ rotation.T for name, x in part.items()} for part in (self.streams, self.readers))
        )


def _place(site: MapSite) -> str:
    """The module that is given what a site reads: a norm, or the layer itself."""
    return (site.parameter if site.gain is None else site.gain.parameter).rpartition(".")[0]


def _side(group: ContinuousGroup, state: State, seen: Mapping[str, Tensor]) -> _Side:
    streams: dict[str, Tensor] = {}
    readers: dict[str, list[Tensor]] = {}
    for site in group.sites:
        if site.power != -1:
            continue
        weight = state[site.parameter].double().movedim(site.axis, -1).flatten(0, -2)
        weight, z = weight[:, to_array(site.positions)], seen[_place(site)]
        if site.gain is not None:
            weight = (
                weight
                * (state[site.gain.parameter].double() + site.gain.offset)[to_array(site.gain.positions)]
            )
            z = z - z.mean(-1, keepdim=True) if group.kind == "rotations that keep ones" else z
            z = z / z.norm(dim=-1, keepdim=True).clamp_min(1e-12) * group.size**0.5
        streams[_place(site)] = z
        readers.setdefault(_place(site), []).append(weight)
    return _Side(streams, {name: torch.cat(weights) for name, weights in readers.items()})


def _meet(a: _Side, b: _Side, norms: Collection[str]) -> Meeting:
    bare = [name for name in a.streams if name not in norms]
    z_a, z_b = (_flat({name: side.streams[name] for name in norms}) for side in (a, b))
    correlation = float((z_a * z_b).sum() / (z_a.norm() * z_b.norm()))
    x, y = _crossed(a, b, norms)
    crossed, agreed = float(x.norm() / y.norm()), float(x @ y / (x.norm() * y.norm()))
    if not bare:
        return Meeting(correlation, crossed, agreed, math.nan)
    x, y = _crossed(a, b, bare)
    return Meeting(correlation, crossed, agreed, float(x.norm() / y.norm()))


def _crossed(a: _Side, b: _Side, places: Iterable[str]) -> tuple[Tensor, Tensor]:
    """What readers make of the other's stream, and what that one's own make of it."""
    crossed, meant = [], []
    for name in places:
        for reader, other in ((a, b), (b, a)):
            crossed.append((other.streams[name] @ reader.readers[name].T).flatten())
            meant.append((other.streams[name] @ other.readers[name].T).flatten())
    return torch.cat(crossed), torch.cat(meant)


def _flat(found: Mapping[str, Tensor]) -> Tensor:
    whole = torch.cat(list(found.values()))
    return whole - whole.mean(0)


def _rank(z: Tensor) -> float:
    variances = torch.linalg.eigvalsh(z.T @ z)
    return float(variances.sum().square() / variances.square().sum())


def _seen(
    model: nn.Module, state: State, places: Iterable[str], run: Callable[[nn.Module], object]
) -> dict[str, Tensor]:
    """Module -> what it is given, float64 [places in the data, neurons]."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept: dict[str, list[Tensor]] = {name: [] for name in places}

    def keep(name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0].detach().double()
        x = (x.movedim(1, -1) if isinstance(module, nn.Conv1d | nn.Conv2d) else x).flatten(0, -2)
        kept[name].append(x[:: max(1, len(x) // MOST)])

    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_pre_hook(partial(keep, name)) for name in kept]
    try:
        model.load_state_dict(dict(state))
        with torch.no_grad():
            run(model)
    finally:
        model.load_state_dict(own)
        for one in hooks:
            one.remove()
    return {name: torch.cat(found) for name, found in kept.items()}


def shuffled(
    spec: PermutationSpec, state: State, seed: int, kinds: Collection[str] = ROTATIONS
) -> dict[str, Tensor]:
    """The entries of each matrix that a group of these kinds acts on in a random order; all else as it is.

    What is learned between A and such a B is the control: it is not B's doing.
    """
    generator = torch.Generator().manual_seed(seed)
    names = {s.parameter for group in spec.continuous if group.kind in kinds for s in group.sites}
    order = {
        n: torch.randperm(t.numel(), generator=generator)
        for n, t in state.items()
        if n in names and t.ndim > 1
    }
    return {n: t.flatten()[order[n]].view_as(t) if n in order else t for n, t in state.items()}


def table(found: list[Stream]) -> Table:
    """A row for each stream: correlation, crossed, agreed and leaving."""
    made = Table("stream", "neurons", "permuted", "closest", "learned", "rank of A", "of B")
    for one in found:
        meetings = (one.permuted, one.closest, one.learned)
        told = (f"{m.correlation:.2f} {m.crossed:.2f} {m.agreed:.2f} {m.leaving:.2f}" for m in meetings)
        made.add_row(one.name, str(one.size), *told, f"{one.rank_a:.0f}", f"{one.rank_b:.0f}")
    return made

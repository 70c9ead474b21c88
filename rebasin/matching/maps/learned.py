"""Learned alignments: maps of both ends under which the models between them have a small loss.

A rotation that brings two streams closest is not the one under which their mean computes well (docs/continuous.md). So
the maps are learned: with A' = M_A A and B' = M_B pi(B), exact symmetries of either model, minimise by gradient

    loss((1 - lambda) A' + lambda B'),      lambda ~ U(lam_low, lam_high),

over skew matrices S with M = exp(S - S^T) (for LayerNorm in what is orthogonal to the ones), invertible matrices I + X
near the identity, and scales exp(x). The models at the ends stay what they are, whatever is learned. The norm gains of
B are first brought to A's by their own scales, so that what norms give is averaged, not its gains.

Learned maps for transformers: arXiv 2506.22712, which gives up the architecture for them; here it stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...arguments import check_choices, check_range, typed
from ...errors import ConfigError, DataError
from ...objectives import LossFunction, Objective
from ...spec import DIAGONAL, Alignment, ContinuousGroup, PermutationSpec, to_array
from ...spec.continuous import KINDS, ones_complement
from ...spec.mapped import MappedState
from ...tensors.modules import device_of, find_device
from ...types import Progress, State, tell
from ..result import Found
from ..result import plain as as_plain
from ..straight_through.draws import Draws, split
from ..straight_through.midpoint import Autocast, Ends
from ..straight_through.starts import Start, candidates, start_from
from ..weights.endpoints import Endpoints
from .gauge import gain_vectors, is_gain

EndsMoved = Literal["both", "b"]

CONDITION = 30.0
"""Invertible matrices beyond this condition number are drawn back half the way to the identity."""

RATIO = 100.0
"""Gains of B that differ from A's by more than this factor, or in sign, stay as they are."""


@dataclass(frozen=True)
class LearnedStep:
    """One step; scores are losses at the midpoint minus the mean of the endpoints' on the same batches."""

    number: int
    train: float | None
    heldout: float | None
    best: float


@dataclass(frozen=True, eq=False)
class LearnedResult(Found):
    """What was learned; `apply` moves both models.

    Attributes:
        alignment_a, alignment_b: what moves A and what moves B; neither changes what is computed.
        objective: the loss at the midpoint minus the mean of A's and B's, on the held-out batches; `start_objective`
            and `initial_objective` are those of the start and of the plain midpoint.
        endpoints: the losses of A and B there.
        history: the steps; `best_step` is the one that is returned (0: the start).
        left_out: continuous groups that could not be moved, and why.
    """

    alignment_a: Alignment
    alignment_b: Alignment
    objective: float
    start_objective: float
    initial_objective: float
    endpoints: tuple[float, float]
    history: tuple[LearnedStep, ...]
    best_step: int
    seconds: float
    distance_before: float
    distance_after: float
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def permutation(self) -> Any:  # type: ignore[override]
        """That of B."""
        return self.alignment_b.permutation

    @property
    def converged(self) -> bool:
        """Nothing better was found in the last fifth of the steps."""
        return self.best_step <= 0.8 * (len(self.history) - 1)

    def apply(self, state_a: State, state_b: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A and B moved, so that their mean computes well."""
        return self.alignment_a.apply(state_a), self.alignment_b.apply(state_b)

    def to_dict(self) -> dict[str, Any]:
        told = as_plain(self, "alignment_a", "alignment_b")
        return {**told, "moved": self.moved, "moved_per_group": self.moved_per_group}


@typed
def learned_matching(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    objective: Objective | LossFunction,
    batches: Sequence[Any],
    *,
    heldout: Sequence[Any] | None = None,
    init: Start = "activation_and_weight",
    ends: EndsMoved = "both",
    kinds: Sequence[str] | None = None,
    steps: int = 250,
    lr: float = 2e-2,
    lam_low: float = 0.4,
    lam_high: float = 0.6,
    evaluate_every: int = 10,
    autocast: Autocast | None = None,
    checkpointing: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> LearnedResult:
    """Learn maps of both ends under which the models between them have a small loss.

    The start is a candidate like any other, so on the held-out batches the result is never worse than it.

    Args:
        spec: the architecture's symmetries, `spec.continuous` among them.
        model_a, model_b: the endpoints, of one architecture.
        objective: what good means; see `rebasin.objectives`. A function (model, batch) -> loss will do.
        batches: of the objective; they are gone through in a random order, again and again.
        heldout: more of them, by which the best step is chosen. Default: the last fifth of `batches`. Data that results
            are reported on belongs in neither.
        init: the permutation to start from, see `rebasin.straight_through`.
        ends: whether maps move both ends or B alone.
        kinds: of the continuous groups, those to learn ("rotations", "rotations that keep ones", "invertible",
            "scales", "positive scales"); None: all.
        steps: gradient steps of Adam.
        lr: its learning rate, which falls to 0 along a cosine.
        lam_low, lam_high: lambda is drawn uniformly from between them at each step.
        evaluate_every: steps between looks at the held-out batches; the last step always has one.
        autocast: "bf16" computes losses and gradients in bfloat16 where torch deems that safe.
        checkpointing: keep only the activations between blocks, for a third more time.
        seed: of the order of the batches and of lambda.
        device: where to compute; default: where `model_a` is.
        progress: called after each step with stage, step, total, objective (the best so far), loss and seconds.

    Raises:
        SpecMismatchError, CheckpointError: models, spec and initial permutation do not go together.
        ConfigError: an option does not fit, or there is nothing to learn.
        DataError: there are no batches, or a loss is not a finite number.
    """
    began = perf_counter()
    check_choices(ends=(ends, EndsMoved), autocast=(autocast, Autocast))
    check_range(1, steps=steps, evaluate_every=evaluate_every)
    check_range(0, lr=lr, seed=seed)
    check_range(0, 1, lam_low=lam_low, lam_high=lam_high)
    unknown = sorted(set(kinds or ()) - set(KINDS))
    if unknown or lam_low > lam_high:
        told = (
            f"kinds has {unknown[0]!r}; choose of {', '.join(KINDS)}"
            if unknown
            else "lam_low is above lam_high"
        )
        raise ConfigError(f"{told}.")
    learn, select = split(batches, heldout)
    where = device_of(model_a) if device is None else find_device(device)
    pair = Ends(spec, model_a, model_b, objective, where, autocast)
    left_out = {**spec.stuck(pair.a), **spec.stuck(pair.b)}
    gains = gain_vectors(spec)
    groups = [
        g
        for g in spec.continuous
        if g.name not in left_out
        and g.kind != "signs"
        and (kinds is None or g.kind in kinds)
        and not is_gain(g, gains)
    ]
    if not groups:
        raise ConfigError(
            "There is nothing to learn: the spec has no continuous group of these kinds that can act."
        )
    with pair.ready(checkpointing):
        endpoints = pair.endpoints(select)
        mean = sum(endpoints) / 2
        naive = pair.evaluate(pair.midpoint(spec.identity()), select) - mean
        if not math.isfinite(naive + mean):
            raise DataError(
                "The losses of A, B and their midpoint on the held-out batches must be finite numbers."
            )
        found = [
            start_from(n, spec, model_a, model_b, objective, batches, seed, where) for n in candidates(init)
        ]
        start = (
            min(found, key=lambda p: pair.evaluate(pair.midpoint(p), select)) if len(found) > 1 else found[0]
        )
        gauge = Alignment(start, _same_gains(spec, pair.a, start.view(pair.b), gains))
        base_a, base_b = dict(pair.a), {**pair.a, **gauge.apply(pair.b)}
        sides = _Side(spec, groups, base_a, where, ends == "both"), _Side(spec, groups, base_b, where, True)

        def score() -> float:
            with torch.no_grad():
                return pair.evaluate(_between(*sides, 0.5), select) - mean

        best = first = score()
        kept, best_step = [side.copy() for side in sides], 0
        history = [LearnedStep(0, None, first, first)]
        latents = [x for side in sides for x in side.latents.values()]
        optimizer = torch.optim.Adam(latents, lr=lr)
        generator = torch.Generator().manual_seed(seed)
        draw = Draws(pair, learn, 1, seed)
        for step in range(1, steps + 1):
            (batch,) = next(draw)
            share = lam_low + (lam_high - lam_low) * float(torch.rand((), generator=generator))
            for one in optimizer.param_groups:
                one["lr"] = lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = pair.loss(_between(*sides, share), batch)
            loss.backward()
            optimizer.step()
            for side in sides:
                side.guard()
            told = None
            if step % evaluate_every == 0 or step == steps:
                told = score()
                if told < best:
                    best, best_step, kept = told, step, [side.copy() for side in sides]
            train = float(loss.detach()) - draw.endpoints_mean()
            history.append(LearnedStep(step, train, told, best))
            seconds = perf_counter() - began
            left = seconds / step * (steps - step)
            tell(
                progress, "learned maps", step, steps, objective=best, loss=train, seconds=seconds, left=left
            )
        for side, values in zip(sides, kept, strict=True):
            side.restore(values)
        moved_a = Alignment(spec.identity(), sides[0].matrices())
        moved_b = Alignment(spec.identity(), sides[1].matrices()).compose(gauge)
    weights = Endpoints(spec, pair.a, pair.b, device=where)
    before = weights.distance
    weights.set(start)
    return LearnedResult(
        alignment_a=moved_a,
        alignment_b=moved_b,
        objective=best,
        start_objective=first,
        initial_objective=naive,
        endpoints=endpoints,
        history=tuple(history),
        best_step=best_step,
        seconds=perf_counter() - began,
        distance_before=before,
        distance_after=weights.distance,
        left_out=left_out,
    )


def _same_gains(
    spec: PermutationSpec, a: Mapping[str, Tensor], b: Mapping[str, Tensor], gains: set[str]
) -> dict[str, Tensor]:
    """The scales that give B's norms the gains of A's."""
    found = {}
    for group in spec.continuous:
        if not is_gain(group, gains):
            continue
        site = next(s for s in group.sites if s.parameter in gains and s.power == 1)
        positions = torch.from_numpy(to_array(site.positions))
        ratio = a[site.parameter].double().cpu()[positions] / b[site.parameter].double().cpu()[positions]
        fits = ratio.isfinite() & (ratio > 1 / RATIO) & (ratio < RATIO)
        found[group.name] = torch.where(fits, ratio, torch.ones_like(ratio))
    return found


class _Side:
    """One model's tensors under maps that are learned; `latents`: group name -> what is learned, 0 for the identity."""

    def __init__(
        self,
        spec: PermutationSpec,
        groups: Sequence[ContinuousGroup],
        tensors: dict[str, Tensor],
        device: torch.device,
        moves: bool,
    ) -> None:
        self.spec, self.groups, self.tensors = spec, groups if moves else (), tensors
        self.latents = {
            g.name: torch.zeros(_latent_shape(g), device=device, requires_grad=True) for g in self.groups
        }
        self.names = {site.parameter for g in groups for site in g.sites}

    def moved(self) -> dict[str, Tensor]:
        """The tensors that any side's maps act on."""
        maps = {g.name: matrices(g, self.latents[g.name]) for g in self.groups}
        view = MappedState(self.spec.continuous, maps, self.spec.aliases, self.tensors)
        return {name: view[name] for name in self.names}

    def matrices(self) -> dict[str, Tensor]:
        """What was learned, float64."""
        return {g.name: matrices(g, self.latents[g.name].detach().double().cpu()) for g in self.groups}

    def guard(self) -> None:
        with torch.no_grad():
            for group in self.groups:
                if group.kind == "invertible":
                    x = self.latents[group.name]
                    wild = torch.linalg.cond(matrices(group, x).double()) > CONDITION
                    x[wild] *= 0.5

    def copy(self) -> dict[str, Tensor]:
        return {name: x.detach().clone() for name, x in self.latents.items()}

    def restore(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.latents[name].copy_(value)


def _between(a: _Side, b: _Side, share: float) -> dict[str, Tensor]:
    """(1 - share) A' + share B', all tensors of the model."""
    moved_a, moved_b = a.moved(), b.moved()
    middle = {}
    for name, tensor in a.tensors.items():
        x, y = moved_a.get(name, tensor), moved_b.get(name, b.tensors[name])
        middle[name] = torch.lerp(x, y, share) if x.is_floating_point() else x
    return middle


def _latent_shape(group: ContinuousGroup) -> tuple[int, ...]:
    if group.kind in DIAGONAL:
        return group.shape
    n = group.size - (group.kind == "rotations that keep ones")
    return (group.count, n, n)


def matrices(group: ContinuousGroup, latent: Tensor) -> Tensor:
    """The matrices of a group for what is learned: exp(S - S^T), I + X, or exp(x); differentiable."""
    if group.kind in DIAGONAL:
        return latent.exp()
    if group.kind == "invertible":
        return torch.eye(group.size, dtype=latent.dtype, device=latent.device) + latent
    turned = torch.linalg.matrix_exp(latent - latent.mT)
    if group.kind == "rotations":
        return turned
    basis = ones_complement(group.size).to(latent)
    return basis @ turned @ basis.mT + 1 / group.size

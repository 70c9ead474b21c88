"""Learned alignments: maps of B under which the models between A and B have a small loss.

A rotation that brings two streams closest is not the one under which their mean computes well (docs/continuous.md). So
the maps are learned: over the exact symmetries M of the architecture, minimise by gradient

    loss((1 - lambda) A + lambda M pi(B)),      lambda ~ U(lam_low, lam_high),

or, which is what a barrier asks for, its worst lambda (`shares`).

B stays what it is, whatever is learned. A need not move: maps are linear on the weights, so the models between M_A A
and M_B pi(B) compute what those between A and M_A^-1 M_B pi(B) do. That holds if both have the same norm gains, by
which maps are turned: B's are first brought to A's by their own scales, so that what norms give is averaged, too.

Learned maps for transformers: arXiv 2506.22712, which gives up the architecture for them; here it stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ...arguments import Count, Positive, Seed, Share, Within, typed
from ...errors import ConfigError, DataError, SpecMismatchError
from ...merging.interpolate import interpolate_tensor
from ...objectives import LossFunction, Objective
from ...spec import DIAGONAL, Alignment, ContinuousGroup, PermutationSpec, to_array
from ...spec.continuous import Kind
from ...tensors.modules import device_of, find_device
from ...types import Progress, tell
from ..candidates import Start, start_of
from ..straight_through.auxiliary import rate_of
from ..straight_through.draws import Draws, few, split
from ..straight_through.midpoint import Autocast, Ends
from ..straight_through.state import fingerprint
from .gauge import gain_vectors, is_gain
from .latents import Latents, turned
from .matching import weight_alignment
from .result import Learned, LearnedResult, LearnedState, LearnedStep
from .shares import LamDraw, Shares

MapsStart = Start | Literal["weight_alignment"] | Alignment
PositiveShare = Annotated[float, Within(0, 1, above=True)]

START = 500
"""So many samples are looked at for the permutation that learning starts from."""

RATIO = 100.0
"""Gains of B that differ from A's by more than this factor, or in sign, stay as they are."""


@typed
def learned_matching(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    objective: Objective | LossFunction,
    batches: Sequence[Any],
    *,
    heldout: Sequence[Any] | None = None,
    init: MapsStart = "activation_and_weight",
    kinds: Sequence[Kind] | None = None,
    balanced: Sequence[str] | None = None,
    steps: Count = 250,
    lr: Positive = 4e-2,
    lam_low: Share = 0.4,
    lam_high: PositiveShare = 0.6,
    lam_draw: LamDraw = "uniform",
    evaluate_every: Count = 10,
    autocast: Autocast | None = None,
    checkpointing: bool = False,
    seed: Seed = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    checkpoint: Callable[[LearnedState], None] | None = None,
    resume_from: LearnedState | None = None,
) -> LearnedResult:
    """Learn maps of B under which the models between A and B have a small loss.

    The start is a candidate like any other, so on the held-out batches the result is never worse than it. Models run in
    eval mode and are left as they were.

    Args:
        spec: the architecture's symmetries, `spec.continuous` among them.
        model_a, model_b: the endpoints, of one architecture.
        objective: what good means; see `rebasin.objectives`. A function (model, batch) -> loss will do.
        batches: of the objective; they are gone through in a random order, again and again.
        heldout: more of them, by which the best step is chosen: by the loss in the middle of the range that lambda is
            drawn from, or, where that is wider than 0.2, by the worst at a quarter, half and three quarters of it, or
            at nine shares of it if `lam_draw` is "worst". Default: the last fifth of `batches`, of a single one this
            one again. Data that results are reported on belongs in neither.
        init: where it starts: a permutation by name (see `rebasin.straight_through`), "weight_alignment", a permutation
            or an alignment, so that what another search found can be gone on from, in turns.
        kinds: of the continuous groups, those to learn ("rotations", "rotations that keep ones", "invertible",
            "scales", "positive scales"); None: all.
        balanced: names of groups of scales that keep a geometric mean of 1 and stay within a factor of 20: for scales
            of what a norm reads, which it does not see, so that they can turn the whole line into one of the ends.
        steps: gradient steps of Adam.
        lr: its learning rate, which falls to 0 along a cosine.
        lam_low, lam_high: lambda, B's share, is drawn from between them at each step.
        lam_draw: "uniform", or "worst": more often where the losses so far were furthest above the line between the
            ends', which lowers the barrier rather than a mean over the line.
        evaluate_every: steps between looks at the held-out batches; the last step always has one.
        autocast: "bf16" computes losses and gradients in bfloat16 where torch deems that safe.
        checkpointing: keep only the activations between blocks, for a third more time.
        seed: of the order of the batches and of lambda.
        device: where to compute; default: where `model_a` is.
        progress: called after each step with stage, step, total, objective (the best so far), loss, heldout, seconds
            and left; `best` is a function that makes the best alignment so far.
        checkpoint: called after the start and each step with a `LearnedState` that can be saved.
        resume_from: such a state; the end is that of the uninterrupted search.

    Raises:
        SpecMismatchError, CheckpointError: models, spec and start do not go together.
        ConfigError: an option, or the state to continue from, does not fit, or there is nothing to learn.
        DataError: there are no batches, or a loss is not a finite number.
    """
    given = dict(locals())
    if lam_low > lam_high:
        raise ConfigError("lam_low is above lam_high.")
    learn, select = split(batches, heldout)
    where = device_of(model_a) if device is None else find_device(device)
    ends = Ends(spec, model_a, model_b, objective, where, autocast)
    left_out = {**spec.stuck(ends.a), **spec.stuck(ends.b)}
    groups = _learnable(spec, left_out, kinds)
    scales = {group.name for group in groups if group.kind in DIAGONAL}
    if unknown := sorted(set(balanced or ()) - scales):
        raise ConfigError(f"balanced has {unknown[0]!r}, which is no group of scales that is learned here.")

    options: dict[str, str] = {}
    if checkpoint is not None or resume_from is not None:
        options = fingerprint(ends, objective, [list(learn), list(select)], given)
    last = LearnedState(options) if resume_from is None else resume_from
    last.require(options)
    seconds = {"start": 0.0, "gradient": 0.0, "scoring": 0.0, **last.seconds}

    @contextmanager
    def clock(part: str) -> Iterator[None]:
        began = perf_counter()
        yield
        seconds[part] += perf_counter() - began

    shares = Shares(lam_low, lam_high, lam_draw, seed, last.told)
    with ends.ready(checkpointing):
        with clock("start"):
            if last.start is None:
                found = _start(init, ends, model_a, model_b, objective, (learn, select), seed)
                same = _same_gains(spec, ends.a, found.view(ends.b))
                gauge = Alignment(spec.identity(), same).compose(found)
            else:
                gauge = Alignment(last.start, dict(last.gauge))
                found, same = Alignment(last.start, dict(last.given)), last.gauge
            b = {**ends.a, **gauge.apply(ends.b)}
            latents = Latents(spec, groups, b, where, balanced or ())
            latents.restore(last.latents)

        def between(share: float) -> dict[str, Tensor]:
            """(1 - share) A + share M pi(B), all tensors of the model."""
            found = {name: interpolate_tensor(name, ends.a[name], t, share) for name, t in latents.moved()}
            for name, a in ends.a.items():
                if name not in found:
                    found[name] = interpolate_tensor(name, a, b[name], share)
            return found

        def excess(at: Callable[[float], Mapping[str, Tensor]], losses: tuple[float, float]) -> float:
            """By how much the held-out loss between the ends is above the line between theirs, where it is worst."""
            found = []
            for share in shares.judged:
                line = (1 - share) * losses[0] + share * losses[1]
                found.append(ends.evaluate(at(share), select) - line)
            return max(found) if all(map(math.isfinite, found)) else math.nan

        def best() -> Alignment:
            if seen.as_given and not seen.best_step:
                return found
            return Alignment(spec.identity(), latents.maps(kept)).compose(gauge)

        def keep() -> None:
            if checkpoint is not None:
                now = (
                    gauge.permutation,
                    gauge.maps,
                    found.maps,
                    seen,
                    latents.tensors,
                    kept,
                    draw.made,
                    shares.told,
                    dict(seconds),
                )
                checkpoint(LearnedState(options, *now))

        kept = {name: tensor.to(where) for name, tensor in last.kept.items()} or latents.copy()
        draw = Draws(ends, learn, 1, seed, last.draws)
        if last.seen is None:
            with clock("scoring"):
                losses = ends.endpoints(select)
                naive = excess(lambda share: ends.between(spec.identity(), share), losses)
                alike = excess(between, losses)
                first = excess(lambda share: ends.between(found, share), losses) if same else alike
            if not math.isfinite(naive + first):
                raise DataError(
                    "The losses of A, B and their midpoint on the held-out batches must be finite numbers."
                )
            lowest = min(first, alike)
            start = LearnedStep(0, "start", None, first, lowest, 0.0, seconds["scoring"])
            seen = Learned(losses, naive, first, lowest, history=(start,), as_given=first <= alike)
            keep()
        else:
            seen = last.seen
        distance = seen.history[-1].turned
        for step in range(len(seen.history), steps + 1):
            before = sum(seconds.values())
            with clock("gradient"):
                chosen = next(draw)
                share = shares.draw(step)
                loss, slopes = ends.gradient(between(share), chosen, by=latents.names)
                latents.descend(slopes, share, rate_of("cosine", lr, step, steps))
            with clock("scoring"):
                told = None
                if step % evaluate_every == 0 or step == steps:
                    told = excess(between, seen.endpoints)
                    if told < seen.objective:  # never true of a loss that is not a number
                        seen = replace(seen, objective=told, best_step=step)
                        kept = latents.copy()
                    far = turned(latents.groups, latents.maps())
                    distance = sum(far.values()) / len(far)
                of_a, of_b = draw.endpoints()
                train = loss - (of_a + of_b) / 2
                shares.tell(share, loss - (1 - share) * of_a - share * of_b)
            took = sum(seconds.values()) - before
            now = LearnedStep(step, "step", train, told, seen.objective, distance, took)
            seen = replace(seen, history=(*seen.history, now))
            spent = sum(seconds.values())
            left = spent / step * (steps - step)
            tell(
                progress, "learned maps", step, steps, objective=seen.objective, loss=train, heldout=told,
                seconds=spent, left=left, best=best,
            )  # fmt: skip
            keep()
        alignment = best()
        far = turned(latents.groups, latents.maps(kept))
    by_maps = init == "weight_alignment" or (isinstance(init, Alignment) and bool(init.maps))
    return LearnedResult(
        alignment=alignment,
        start=None if by_maps else gauge.permutation,
        objective=seen.objective,
        start_objective=seen.first,
        initial_objective=seen.naive,
        endpoints=seen.endpoints,
        history=seen.history,
        best_step=seen.best_step,
        turned=far,
        left_out=left_out,
        distance_before=_distance(ends.a, ends.b),
        distance_after=_distance(ends.a, alignment.view(ends.b)),
        seconds=sum(seconds.values()),
        **{f"seconds_{part}": value for part, value in seconds.items()},
    )


def _learnable(
    spec: PermutationSpec, left_out: Mapping[str, str], kinds: Sequence[str] | None
) -> list[ContinuousGroup]:
    """The groups to learn. Signs have no gradient, and the gains of norms are a gauge.

    Raises:
        ConfigError: there is none.
    """
    gains = gain_vectors(spec)
    found = [
        group
        for group in spec.continuous
        if group.name not in left_out
        and group.kind != "signs"
        and (kinds is None or group.kind in kinds)
        and not is_gain(group, gains)
    ]
    if not found:
        raise ConfigError(
            "There is nothing to learn: the spec has no continuous group of these kinds that can act."
        )
    return found


def _start(
    init: MapsStart,
    ends: Ends,
    model_a: nn.Module,
    model_b: nn.Module,
    objective: Objective | LossFunction,
    batches: tuple[Sequence[Any], Sequence[Any]],
    seed: int,
) -> Alignment:
    """What `init` stands for."""
    learn, select = few(batches[0], START), batches[1]
    if isinstance(init, Alignment):
        if init.spec.maps_hash != ends.spec.maps_hash or not ends.spec.contains(init.permutation):
            raise SpecMismatchError(
                "The initial alignment is not legal for this spec: it was made for another architecture."
            )
        return init
    if init == "weight_alignment":
        return weight_alignment(ends.spec, ends.a, ends.b, seed=seed).alignment
    data = ends.spec, model_a, model_b, objective, learn, seed, ends.device
    return Alignment.of(start_of(init, lambda one: ends.evaluate(ends.midpoint(one), select), *data))


def _same_gains(spec: PermutationSpec, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scales that give B's norms the gains of A's."""
    found, gains = {}, gain_vectors(spec)
    for group in spec.continuous:
        if not is_gain(group, gains):
            continue
        site = next(s for s in group.sites if s.parameter in gains and s.power == 1)
        positions = torch.from_numpy(to_array(site.positions))
        ratio = a[site.parameter].double().cpu()[positions] / b[site.parameter].double().cpu()[positions]
        fits = ratio.isfinite() & (ratio > 1 / RATIO) & (ratio < RATIO)
        found[group.name] = torch.where(fits, ratio, torch.ones_like(ratio))
    return found


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """|A - B| over the tensors of both."""
    return math.sqrt(
        sum(
            float((a[name].double() - b[name].double()).square().sum())
            for name in b
            if a[name].is_floating_point()
        )
    )

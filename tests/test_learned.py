"""Learned maps: a planted rotation is undone by the loss between the ends, and the ends stay what they are."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from test_maps import C, Residual
from torch import Tensor, nn

import rebasin
from rebasin.errors import ConfigError, DataError
from rebasin.matching import LearnedResult, LearnedState, learned_matching, match_by_maps
from rebasin.matching.maps.latents import BALANCED, FACTOR, Latents, matrices
from rebasin.matching.maps.result import LearnedStep
from rebasin.matching.maps.shares import STRETCHES, LamDraw, Shares
from rebasin.spec import Alignment, PermutationSpec
from rebasin.spec.mapped import MappedState
from rebasin.types import ProgressEvent


@cache
def planted() -> tuple[PermutationSpec, nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """A, the same function in other weights, and inputs with what both compute."""
    torch.manual_seed(0)
    model = Residual().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(40, 5, C)
    spec = rebasin.trace(model, x[:2])
    other = copy.deepcopy(model)
    moved = spec.random_alignment(1)
    other.load_state_dict(
        moved.without(n for n in moved.maps if "0.q" in n or "0.v" in n).apply(model.state_dict())
    )
    with torch.no_grad():
        batches = [(part, model(part)) for part in x.split(10)]
    return spec, model, other, batches


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def learned(**options: object) -> LearnedResult:
    spec, a, b, batches = planted()
    given = {"steps": 60, "init": "weight_matching", "lr": 0.1, "lam_low": 0.5, "lam_high": 0.5, **options}
    return learned_matching(spec, a, b, loss, batches, **given)  # type: ignore[arg-type]


def figures(found: LearnedResult) -> list[LearnedStep]:
    return [replace(step, seconds=0.0) for step in found.history]


def test_the_loss_between_the_ends_falls_and_the_ends_stay() -> None:
    _, a, b, batches = planted()
    state_a, state_b = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
    found = learned()
    assert found.objective < 0.45 * found.start_objective and found.best_step > 0
    assert found.endpoints == pytest.approx((0, 0), abs=1e-8)
    scores = [step.objective for step in found.history]
    assert scores == sorted(scores, reverse=True) and len(scores) == 61
    told = [step.heldout for step in found.history if step.heldout is not None]
    assert found.objective == min(told) and found.start_objective == told[0]
    moved_a, moved_b = found.apply(a.state_dict(), b.state_dict())
    assert all(torch.equal(t, moved_a[n]) for n, t in state_a.items())
    again = copy.deepcopy(b)
    again.load_state_dict(moved_b)
    torch.testing.assert_close(again(batches[0][0]), b(batches[0][0]), rtol=1e-4, atol=1e-4)
    middle = copy.deepcopy(a)
    middle.load_state_dict({n: (t + moved_b[n]) / 2 for n, t in moved_a.items()})
    assert float(loss(middle, batches[-1])) == pytest.approx(found.objective, rel=1e-3)
    assert all(torch.equal(t, state_a[n]) for n, t in a.state_dict().items())
    assert all(torch.equal(t, state_b[n]) for n, t in b.state_dict().items())


@pytest.mark.parametrize(
    ("low", "high", "how", "shares"),
    [
        (0.4, 0.6, "uniform", [0.5]),
        (0.2, 0.4, "uniform", [0.3]),
        (0.4, 0.6, "worst", [0.5]),
        (0.2, 1.0, "uniform", [0.4, 0.6, 0.8]),
        (0.0, 1.0, "worst", [k / 10 for k in range(1, 10)]),
    ],
)
def test_what_is_asked_for_is_what_is_selected_by(
    low: float, high: float, how: LamDraw, shares: list[float]
) -> None:
    """The midpoint alone says little of a line that is learned as a whole."""
    spec, a, b, batches = planted()
    batches = [(x, 0.7 * y) for x, y in batches]  # the ends' losses are not 0
    found = learned_matching(
        spec,
        a,
        b,
        loss,
        batches,
        init="weight_matching",
        steps=20,
        lam_low=low,
        lam_high=high,
        lam_draw=how,
        evaluate_every=5,
    )

    def worst(moved: dict[str, Tensor]) -> float:
        line = copy.deepcopy(a)
        excess = []
        for share in shares:
            line.load_state_dict(rebasin.interpolate(a.state_dict(), moved, share))
            between = (1 - share) * found.endpoints[0] + share * found.endpoints[1]
            excess.append(loss(line, batches[-1]).item() - between)
        return max(excess)

    assert found.objective == pytest.approx(worst(found.alignment.apply(b.state_dict())), rel=1e-3, abs=1e-6)
    assert found.initial_objective == pytest.approx(worst(b.state_dict()), rel=1e-4)
    told = {step.number: step.heldout for step in found.history if step.heldout is not None}
    assert found.objective == min(told.values()) == told[found.best_step] <= found.start_objective


def test_the_highest_stretch_of_the_line_is_drawn_most_and_none_is_forgotten() -> None:
    """As often as `shares` has it; the first draws, before anything was told, are uniform."""
    worst, even = Shares(0.1, 0.9, "worst", 0), Shares(0.1, 0.9, "uniform", 0)
    uniform = [
        np.histogram([of.draw(n) for n in range(4000)], STRETCHES, (0.1, 0.9))[0] for of in (worst, even)
    ]
    assert all(count.max() < 1.25 * count.min() for count in uniform)
    for _ in range(40):
        for share in np.linspace(0.1, 0.9, 41):
            worst.tell(float(share), 0.5 if 0.58 < share < 0.66 else 0.2)
    found = [worst.draw(n) for n in range(4000)]
    assert min(found) >= 0.1 and max(found) <= 0.9
    rates = np.histogram(found, STRETCHES, (0.1, 0.9))[0] / 4000
    likely = np.exp(4 * np.eye(STRETCHES)[6])
    wanted = 0.85 * likely / likely.sum() + 0.015
    assert np.abs(rates - wanted).max() < 0.02 and rates.min() > 0.02
    assert Shares(0.5, 0.5, "worst", 0).draw(3) == 0.5


@pytest.mark.parametrize("seed", range(8))
def test_the_highest_stretch_is_found_by_drawing(seed: int) -> None:
    """In the steps that a search has by default, from what it draws itself."""
    shares, count = Shares(0.0, 1.0, "worst", seed), np.zeros(STRETCHES, dtype=int)
    for step in range(250):
        share = shares.draw(step)
        count[int(share * STRETCHES)] += 1
        shares.tell(share, 1.0 if int(share * STRETCHES) == 3 else 0.5)
    assert count.argmax() == 3 and count[3] > 0.6 * 250 and count.min() > 0


def test_seeds_ends_and_kinds() -> None:
    few = {"steps": 4, "evaluate_every": 2}
    one, same, other = learned(**few), learned(**few), learned(**few, seed=1)
    assert one.alignment.is_close(same.alignment, 1e-12) and figures(one) == figures(same)
    assert not one.alignment.is_close(other.alignment)
    only = learned(**few, kinds=["rotations that keep ones"])
    assert only.objective <= only.start_objective and set(only.turned) == {"enter.weight[0]"}
    gains = {f"norms.{k}.weight[0]" for k in range(3)}
    assert set(only.alignment.maps) == {"enter.weight[0]", *gains}


def test_a_search_that_only_loses_returns_its_start() -> None:
    found = learned(steps=3, lr=5.0, evaluate_every=1, init=learned().alignment)
    assert found.objective == found.start_objective and found.best_step == 0
    assert min(step.heldout or 0 for step in found.history[1:]) > found.objective + 0.01
    assert max(found.turned.values()) < 1e-12


def test_what_can_not_be_learned_is_told() -> None:
    spec, a, b, batches = planted()
    with pytest.raises(ConfigError, match=r"kinds\[0\] is 'rotation'; choose one of invertible"):
        learned(kinds=["rotation"])
    with pytest.raises(ConfigError, match="lam_low is above lam_high"):
        learned(lam_low=0.7, lam_high=0.3)
    gains, rotations = "norms.0.weight[0]", ["rotations that keep ones"]
    for of, kinds in (
        ("enter", None),
        ("parts.1.up.weight[0]", rotations),
        (gains, None),
        ("enter.weight[0]", None),
    ):
        with pytest.raises(
            ConfigError, match=f"balanced has {of!r}, which is no group of scales".replace("[", ".")
        ):
            learned(balanced=[of], kinds=kinds)
    for nothing in ({"lr": 0.0}, {"lam_low": 0.0, "lam_high": 0.0}):
        with pytest.raises(ConfigError, match="is 0.0, but it must be above 0"):
            learned(**nothing)
    for size in (1e30, float("inf")):
        with pytest.raises((ConfigError, DataError), match="too large or not finite|must be finite"):
            learned_matching(
                spec, a, b, lambda model, batch, size=size: size * loss(model, batch), batches, steps=2
            )
    for how in ("uniform", "worst"):
        bad = [(x.clone().fill_(torch.inf), y) if k == 1 else (x, y) for k, (x, y) in enumerate(batches)]
        with pytest.raises(
            (ConfigError, DataError), match="not finite|not a finite number: leave that batch out"
        ):
            learned_matching(spec, a, b, loss, bad, steps=20, lam_draw=how, init="identity")
    with pytest.raises(ConfigError, match="nothing to learn"):
        learned(kinds=["rotations"])
    assert learned_matching(spec, a, b, loss, batches, steps=1).left_out == {}


def test_moving_both_ends_is_moving_one() -> None:
    """Why A stays: the models between M_A A and M_B B compute what those between A and M_A^-1 M_B B do."""
    _, a, b, batches = planted()
    spec = planted()[0]
    drawn = (spec.random_alignment(seed).maps for seed in (2, 3))
    of_a, of_b = (
        Alignment(spec.identity(), {name: m for name, m in maps.items() if not name.startswith("norms")})
        for maps in drawn
    )
    state_a, state_b = a.state_dict(), {**a.state_dict()}
    for name, tensor in b.state_dict().items():
        state_b[name] = a.state_dict()[name] if "norm" in name else tensor  # equal gains
    both = of_a.apply(state_a), of_b.apply(state_b)
    one = state_a, of_a.invert().compose(of_b).apply(state_b)
    outputs = []
    for first, second in (both, one):
        model = copy.deepcopy(a)
        model.load_state_dict({n: 0.3 * t + 0.7 * second[n] for n, t in first.items()})
        outputs.append(model(batches[0][0]))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("stop", "how"), [(1, "uniform"), (3, "worst"), (5, "worst")])
def test_what_was_interrupted_ends_as_if_it_had_not_been(stop: int, how: str, tmp_path: Path) -> None:
    few = {"steps": 5, "evaluate_every": 2, "lam_low": 0.0, "lam_high": 1.0, "lam_draw": how}
    whole = learned(**few)
    states: list[LearnedState] = []

    def keep(state: LearnedState) -> None:
        state.save(tmp_path / f"{len(states)}.safetensors")
        states.append(state)

    learned(**few, checkpoint=keep)
    assert len(states) == 6
    again = learned(**few, resume_from=LearnedState.load(tmp_path / f"{stop}.safetensors"))
    assert any(states[stop].told)
    assert figures(again) == figures(whole) and again.best_step == whole.best_step
    assert again.alignment.is_close(whole.alignment, 1e-12)
    with pytest.raises(ConfigError, match="its lr differed"):
        learned(**few, lr=0.2, resume_from=LearnedState.load(tmp_path / "1.safetensors"))


@pytest.mark.parametrize("init", ["weight_alignment", "given", "best"])
def test_where_it_starts(init: str) -> None:
    spec = planted()[0]
    given = learned(steps=10).alignment if init == "given" else init
    told: list[float] = []

    def look(event: ProgressEvent) -> None:
        told.append(event["best"]().spec is spec)

    found = learned(steps=2, init=given, progress=look)
    assert found.objective <= found.start_objective and told == [True, True]
    if init == "given":
        assert found.start_objective == pytest.approx(learned(steps=10).objective, rel=1e-3)


def test_the_gradient_is_that_of_the_loss() -> None:
    """Through the maps tensor by tensor, against autograd through everything at once."""
    spec, _, b, _ = planted()
    tensors = {name: tensor.double() for name, tensor in b.state_dict().items()}
    groups = [group for group in spec.continuous if group.kind != "signs"]
    latents = Latents(spec, groups, tensors, torch.device("cpu"))
    for name, x in latents.values.items():
        latents.values[name] = x.double().normal_(std=0.1)
    wanted = {name: x.clone().requires_grad_() for name, x in latents.values.items()}
    maps = {group.name: matrices(group, wanted[group.name]) for group in groups}
    view = MappedState(spec.continuous, maps, spec.aliases, tensors)
    slopes = {name: torch.randn_like(tensors[name]) for name in latents.names}
    sum((view[name] * slope).sum() for name, slope in slopes.items()).backward()  # type: ignore[union-attr]
    found = latents.gradient(slopes)
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x.grad, rtol=1e-9, atol=1e-9)


def test_maps_stay_where_they_have_an_inverse() -> None:
    """However long the step: scales within their factor, balanced ones around 1, and not all of them at the ends."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)).eval()
    spec = rebasin.trace(model, torch.randn(2, 4))
    tensors = {name: t.detach() for name, t in model.named_parameters()}
    (group,) = spec.continuous
    for balanced, most in (((), FACTOR), ((group.name,), BALANCED)):
        latents = Latents(spec, spec.continuous, tensors, torch.device("cpu"), balanced)
        for rate in (1.0, 100.0):
            latents.descend({name: torch.randn_like(tensors[name]) for name in latents.names}, 0.5, rate)
            logs = torch.cat(list(latents.maps().values())).log()
            assert logs.abs().max() < math.log(1.01 * most)
            assert (logs.abs() > math.log(0.99 * most)).any() == (rate == 100)
            assert not balanced or logs.mean().abs() < 1e-5


def test_many_models_come_into_one_basis() -> None:
    """By the weights what was planted is found again; by the loss two models become the learned midpoint."""
    spec, a, b, batches = planted()
    state = {n: t.clone() for n, t in a.state_dict().items()}
    states = [state, spec.random_alignment(4).apply(state), spec.random_alignment(5).apply(state)]
    found = match_by_maps(spec, states, by="weights", weights=[1, 2, 1])
    assert found.distance < 1e-4 * found.distance_before and found.weights == (0.25, 0.5, 0.25)
    for member in (found.merged, *found.members(states)):
        for name, tensor in state.items():
            torch.testing.assert_close(member[name], tensor, rtol=1e-3, atol=1e-3)
    few = {"steps": 4, "evaluate_every": 2, "init": "weight_matching", "lr": 0.1}
    both = match_by_maps(spec, [state, b.state_dict()], a, loss, batches, match=few)
    alone = learned(**few, lam_low=0.4, lam_high=0.6)
    assert both.alignments[1].is_close(alone.alignment, 1e-9) and both.alignments[0].is_identity
    for name, tensor in alone.alignment.apply(b.state_dict()).items():
        torch.testing.assert_close(both.merged[name], (state[name] + tensor) / 2)
    assert both.to_dict()["models"] == 2
    with pytest.raises(ConfigError, match="give model, objective and batches, or by='weights'"):
        match_by_maps(spec, states)
    with pytest.raises(ConfigError, match="by loss has no option 'step'; did you mean 'steps'"):
        match_by_maps(spec, states, a, loss, batches, match={"step": 3})

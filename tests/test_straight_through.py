"""The straight-through estimator: what it computes, what it leaves alone, and that it is never worse than its start."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rebasin
from rebasin.data import classification
from rebasin.errors import ConfigError, DataError, RebasinError, SpecMismatchError
from rebasin.matching.assignment import jonker_volgenant, linear_assignment
from rebasin.matching.candidates import candidates
from rebasin.matching.straight_through import midpoint
from rebasin.matching.straight_through.estimator import straight_through
from rebasin.matching.straight_through.loss_descent import descend
from rebasin.matching.straight_through.midpoint import Ends
from rebasin.matching.straight_through.result import StraightThroughResult
from rebasin.matching.straight_through.state import StraightThroughState
from rebasin.matching.weights.matching import weight_matching
from rebasin.matching.weights.projection import Projected, Projector
from rebasin.models import MLP
from rebasin.models.train import Recipe, train
from rebasin.objectives import CrossEntropy
from rebasin.spec import Permutation

CPU = torch.device("cpu")
OBJECTIVE = CrossEntropy()
PLAIN: dict[str, Any] = {"init": "weight_matching", "schedule": "cosine", "evaluate_every": 1, "refine": 0}
"""The gradient alone, from one quick start."""
Batches = list[tuple[Tensor, Tensor]]


class Pair:
    """Two models, their spec, and batches to learn from and to select by."""

    def __init__(self, a: nn.Module, b: nn.Module, batches: Batches) -> None:
        self.a, self.b, self.batches = a.eval(), b.eval(), batches
        self.spec = rebasin.trace(copy.deepcopy(a), batches[0][0][:2])

    def search(self, **options: Any) -> StraightThroughResult:
        options = {**PLAIN, "steps": 12, "lr": 5e-3, **options}
        batches = options.pop("batches", self.batches)
        return straight_through(self.spec, self.a, self.b, OBJECTIVE, batches, **options)

    def excess(self, permutation: Permutation, batches: Batches) -> float:
        """The loss at the midpoint minus the endpoints' mean, computed with modules instead of functional calls."""
        aligned = permutation.apply(self.b.state_dict())
        states = self.a.state_dict(), aligned, rebasin.interpolate(self.a.state_dict(), aligned, 0.5)
        model = copy.deepcopy(self.a)
        losses = []
        for state in states:
            model.load_state_dict(state)
            losses.append(OBJECTIVE.evaluate(model, batches)["loss"])
        return losses[2] - (losses[0] + losses[1]) / 2


def random_batches(shape: tuple[int, ...], count: int = 4, classes: int = 3, size: int = 16) -> Batches:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, *shape, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def digits() -> Pair:
    """Two MLPs of width 24, trained for ten epochs on real digits: far from converged, but with a barrier."""
    data = classification.load("digits")
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = MLP(inputs=64, width=24, depth=2, classes=10)
        train(model, data.train_x, data.train_y, Recipe(epochs=10, learning_rate=3e-3), seed)
        models.append(model)
    return Pair(models[0], models[1], data.batches("train", 250))


@pytest.fixture
def small() -> Pair:
    torch.manual_seed(3)
    a, b = (MLP(inputs=5, width=8, depth=2, classes=3) for _ in range(2))
    return Pair(a, b, random_batches((5,)))


def gradient_norm(pair: Pair, permutation: Permutation, batch: tuple[Tensor, Tensor]) -> float:
    """The norm of the gradient at the midpoint, with a module of its own."""
    model = copy.deepcopy(pair.a)
    aligned = permutation.apply(pair.b.state_dict())
    model.load_state_dict(rebasin.interpolate(pair.a.state_dict(), aligned, 0.5))
    OBJECTIVE.loss(model, batch).backward()
    moved = [p for name, p in model.named_parameters() if name in pair.spec.axes]
    return math.sqrt(sum(float(p.grad.square().sum()) for p in moved if p.grad is not None))


# What one step does -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("represents", "share"), [("b_endpoint", 0.5), ("midpoint", 1.0)])
def test_a_steps_gradient_is_half_of_the_midpoints(small: Pair, represents: Any, share: float):
    batch = small.batches[0]
    found = small.search(steps=1, batches=[batch], represents=represents, init="identity")
    states = small.a.state_dict(), small.b.state_dict()
    start = rebasin.weight_matching(small.spec, *states, init="identity").permutation
    assert found.history[0].moved == start.moved() > 0, "the first projection is weight matching"
    norm = found.history[1].gradient_norm
    assert norm is not None and norm == pytest.approx(share * gradient_norm(small, start, batch), rel=1e-5)


def test_a_step_is_that_of_the_papers_stop_gradient_form(small: Pair):
    """w - lr dL/dw with L = loss(1/2 (A + stop(pi(B)) + (w - stop(w)))), by autograd and by `Ends.gradient`."""
    ends = Ends(small.spec, small.a, small.b, OBJECTIVE, CPU)
    permutation = small.spec.random(seed=1)
    x, y = small.batches[0]
    a, b = small.a.state_dict(), permutation.apply(small.b.state_dict())
    w = {name: tensor.clone().requires_grad_() for name, tensor in a.items()}
    through = {name: b[name].detach() + (w[name] - w[name].detach()) for name in w}
    middle = {name: (a[name] + through[name]) / 2 for name in w}
    OBJECTIVE.loss(small.a, (x, y)).backward()  # other gradients in the way change nothing
    logits = torch.func.functional_call(small.a, middle, (x,))
    nn.functional.cross_entropy(logits, y).backward()
    _, found = ends.gradient(ends.midpoint(permutation), [(x, y)])
    assert found.keys() == set(small.spec.axes)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient / 2, w[name].grad, rtol=1e-5, atol=1e-7)


def test_accumulating_batches_averages_their_gradients(small: Pair):
    ends = Ends(small.spec, small.a, small.b, OBJECTIVE, CPU)
    middle = ends.midpoint(small.spec.identity())
    loss, both = ends.gradient(middle, small.batches[:2])
    singles = [ends.gradient(middle, [batch]) for batch in small.batches[:2]]
    assert loss == pytest.approx(sum(single[0] for single in singles) / 2)
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, (singles[0][1][name] + singles[1][1][name]) / 2)


def test_clipping_limits_the_step_and_tells_the_norm_before(small: Pair):
    options: dict[str, Any] = {"steps": 3, "optimizer": "sgd", "lr": 1.0, "schedule": "constant"}
    free, tight = small.search(**options), small.search(**options, clip=1e-9)
    assert tight.history[1].gradient_norm == free.history[1].gradient_norm
    assert all(step.moved == 0 for step in tight.history[1:]), "steps of 1e-9 move nothing"


# What it returns --------------------------------------------------------------------------------------------


def test_the_best_permutation_is_returned_and_not_the_last(digits: Pair):
    learn, select = digits.batches[:-1], digits.batches[-1:]
    found = digits.search(steps=25, lr=0.05, schedule="constant", heldout=select, batches=learn)
    scores = {step.number: step.heldout for step in found.history if step.heldout is not None}
    last = max(scores)
    assert found.objective == min(scores.values())
    assert found.best_step == min(scores, key=lambda number: scores[number]) < last
    assert scores[last] > found.objective, "with this rate it wanders off, so the two can be told apart"
    assert digits.excess(found.permutation, select) == pytest.approx(found.objective, abs=1e-5)
    assert digits.spec.contains(found.permutation)
    assert [step.objective for step in found.history] == [
        min(score for number, score in scores.items() if number <= step.number) for step in found.history
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 3.0, "schedule": "constant"},
        {"optimizer": "sgd", "lr": 0.3},
        {"init": "identity", "lr": 1e-6},
        {"init": "activation_then_weight", "project_every": 5, "evaluate_every": 4},
        {"represents": "midpoint"},
        {"represents": "midpoint", "projection": "l2", "projection_sweeps": 1},
    ],
)
def test_it_never_ends_worse_than_its_start(digits: Pair, options: dict[str, Any]):
    found = digits.search(heldout=digits.batches[:2], batches=digits.batches[2:], **options)
    assert found.objective <= found.start_objective
    assert digits.excess(found.permutation, digits.batches[:2]) <= found.start_objective + 1e-6
    assert digits.excess(digits.spec.identity(), digits.batches[:2]) == pytest.approx(
        found.initial_objective, abs=1e-5
    )


def test_from_the_identity_it_ends_below_weight_matching(digits: Pair):
    states = digits.a.state_dict(), digits.b.state_dict()
    plain = weight_matching(digits.spec, *states, init="identity").permutation
    matched = digits.search(steps=1, lr=0.0, init=plain).start_objective
    found = digits.search(steps=150, lr=1e-2, init="identity")
    assert found.initial_objective > 10 * matched > 0.5, (
        "there is something to gain, also over weight matching"
    )
    assert found.objective < 0.95 * matched
    assert found.moved == found.permutation.moved() == sum(found.moved_per_group.values()) > 0
    assert found.distance_after < found.distance_before


def test_what_it_tells_adds_up(digits: Pair):
    events: list[dict[str, Any]] = []
    found = digits.search(progress=events.append)
    assert [event["step"] for event in events] == list(range(13)) == [step.number for step in found.history]
    assert [event["objective"] for event in events] == [step.objective for step in found.history]
    assert events[-1]["permutation"] == found.permutation
    assert all(step.train is not None and math.isfinite(step.train) for step in found.history[1:])
    parts = found.seconds_start + found.seconds_projection + found.seconds_gradient + found.seconds_scoring
    assert 0 < parts <= found.seconds
    for part in ("projection", "gradient"):
        by_step = sum(getattr(step, f"seconds_{part}") for step in found.history)
        assert by_step == pytest.approx(getattr(found, f"seconds_{part}"), rel=1e-6)
    plain = found.to_dict()
    assert "permutation" not in plain and len(plain["history"]) == 13


def test_train_losses_are_those_of_the_midpoint_before_the_step(small: Pair):
    found = small.search(steps=1, batches=small.batches[:1], init="identity", lr=0.0)
    again = small.search(steps=2, batches=small.batches[:1], init="identity", lr=0.0)
    assert found.history[1].train == pytest.approx(
        small.excess(found.permutation, small.batches[:1]), abs=1e-6
    )
    assert again.history[2].train == again.history[1].train and again.history[2].moved == 0


def test_two_runs_are_equal(digits: Pair):
    one, two = digits.search(), digits.search()
    assert one.permutation == two.permutation
    assert [step.train for step in one.history] == [step.train for step in two.history]
    other = digits.search(seed=1)
    assert [step.train for step in one.history] != [step.train for step in other.history]


def test_projections_that_remember_are_those_afresh_step_for_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    a, b = (MLP(inputs=20, width=96, depth=2, classes=3) for _ in range(2))
    pair = Pair(a, b, random_batches((20,)))
    warm, starts, moved = Projector.__call__, list[bool](), list[int]()
    inner = jonker_volgenant.solve

    def noted(costs: np.ndarray, duals: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        starts.append(duals is not None)
        return inner(costs, duals)

    def compared(own: Projector, target: Any, permutation: Permutation, most: int, seed: int) -> Projected:
        found = warm(own, target, permutation, most, seed)
        afresh = weight_matching(own.spec, target, own.b, init=permutation, max_sweeps=most, seed=seed)
        assert found == Projected(afresh.permutation, afresh.sweeps)
        moved.append(afresh.moved)
        return found

    linear_assignment._load_solver.cache_clear()
    monkeypatch.setattr(jonker_volgenant, "solve", noted)
    monkeypatch.setattr(Projector, "__call__", compared)
    states = []
    found = pair.search(steps=6, init="identity", lr=2e-2, projection_sweeps=2, checkpoint=states.append)
    linear_assignment._load_solver.cache_clear()
    assert len(moved) == 7 and max(moved) > 0
    assert sum(starts) > len(starts) / 4  # those afresh know duals in their second sweeps alone
    states[4].save(tmp_path / "state")
    monkeypatch.setattr(Projector, "__call__", warm)
    state = StraightThroughState.load(tmp_path / "state")
    assert {key.rpartition("/")[0] for key in state.duals} == set(pair.spec.cells)
    again = pair.search(steps=6, init="identity", lr=2e-2, projection_sweeps=2, resume_from=state)
    assert again.permutation == found.permutation and again.objective == found.objective


def test_projecting_every_few_steps(digits: Pair):
    found = digits.search(steps=14, lr=0.02, project_every=4)
    assert {step.number for step in found.history if step.moved} <= {0, 4, 8, 12, 14}
    assert any(step.moved for step in found.history[1:])
    assert found.sweeps < digits.search(steps=14, lr=0.02).sweeps
    assert found.history[-1].heldout is not None or found.history[-1].moved == 0, (
        "what the last steps led to counts"
    )


def test_scoring_every_few_steps(digits: Pair):
    found = digits.search(steps=20, lr=0.05, evaluate_every=6)
    numbers = [step.number for step in found.history if step.heldout is not None]
    assert len(numbers) > 2
    assert all(later - earlier >= 6 for earlier, later in itertools.pairwise(numbers) if later != 20)


# The refinement ---------------------------------------------------------------------------------------------


def test_no_verified_step_raises_the_loss_of_its_batches(digits: Pair):
    ends = Ends(digits.spec, digits.a, digits.b, OBJECTIVE, CPU)
    batches = digits.batches[:2]
    start = digits.spec.random(seed=1)
    passes = list(descend(ends, start, itertools.repeat(batches), 6, seed=0))
    assert 0 < len(passes) <= 6, "it ends early where no step is left"
    now = digits.excess(start, batches)
    for made in passes:
        assert digits.spec.contains(made.permutation)
        assert made.after - made.before == pytest.approx(
            digits.excess(made.permutation, batches) - now, abs=1e-5
        )
        assert made.after < made.before if made.taken else made.permutation == start
        now = digits.excess(made.permutation, batches)
        start = made.permutation
    assert sum(made.taken for made in passes) > 0


def test_a_refined_search_is_continued_from_its_best(digits: Pair):
    options: dict[str, Any] = {"steps": 25, "lr": 0.05, "schedule": "constant"}
    plain, refined = digits.search(**options), digits.search(**options, refine=8)
    made = len(refined.history) - 26  # it ends early where no step is left
    assert 0 < made <= 8
    assert [step.kind for step in refined.history] == ["start"] + 25 * ["step"] + made * ["pass"]
    assert [step.train for step in refined.history[:26]] == [step.train for step in plain.history]
    # On these networks the start can't be bettered on the held-out fifth; that passes lower their own loss is above.
    assert refined.history[26].objective <= plain.objective
    assert refined.objective <= plain.objective
    assert digits.excess(refined.permutation, digits.batches[-1:]) == pytest.approx(
        refined.objective, abs=1e-5
    )


def test_a_refinement_of_what_can_not_be_better_stops(small: Pair):
    b = copy.deepcopy(small.a)
    with torch.no_grad():  # dead neurons: whatever is done to them, the loss stays
        for model in (small.a, b):
            cast(nn.Linear, cast(MLP, model).layers[-1]).weight.zero_()
    found = straight_through(small.spec, small.a, b, OBJECTIVE, small.batches, steps=1, refine=30)
    assert sum(step.kind == "pass" for step in found.history) == 3


# Where it starts --------------------------------------------------------------------------------------------


def test_a_planted_permutation_is_found(digits: Pair):
    planted = digits.spec.random(seed=7)
    b = copy.deepcopy(digits.a)
    b.load_state_dict(planted.apply(digits.a.state_dict()))
    found = straight_through(digits.spec, digits.a, b, OBJECTIVE, digits.batches, init="identity", steps=3)
    assert found.permutation == planted.invert()
    assert found.objective == pytest.approx(0, abs=1e-6) and found.distance_after == 0


def test_a_given_start_is_taken_and_not_changed(small: Pair):
    given = small.spec.random(seed=2)
    before = {name: index.copy() for name, index in given.index.items()}
    found = small.search(init=given)
    assert found.start_objective == pytest.approx(small.excess(given, small.batches[-1:]), abs=1e-5)
    assert all((given.index[name] == index).all() for name, index in before.items())


def test_the_best_start_is_no_worse_than_any(digits: Pair):
    starts = {init: digits.search(steps=1, init=init).start_objective for init in candidates("best")}
    assert {"identity", "weight_matching", "activation_matching"} < set(starts)
    assert digits.search(steps=1, init="best").start_objective == min(starts.values())


def test_the_last_fifth_of_the_batches_selects(small: Pair):
    with_default = small.search(batches=small.batches * 2, init="identity")
    split = small.search(batches=(small.batches * 2)[:-1], heldout=small.batches[-1:], init="identity")
    assert with_default.permutation == split.permutation and with_default.objective == split.objective


# What it leaves alone ---------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Residual blocks in a list, BatchNorm, tied weights, a buffer that is not saved, and a parameter not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(3)
        )
        self.head = nn.Linear(8, 3)
        self.again = nn.Linear(8, 3)
        self.again.weight = self.head.weight
        self.unused = nn.Parameter(torch.zeros(4))
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return (self.head(x) + self.again(x)) * self.scale


@pytest.fixture
def blocks() -> Pair:
    torch.manual_seed(4)
    a, b = Blocks(), Blocks()
    for model in (a, b):
        model.train()(torch.randn(64, 5))  # running statistics that differ
    return Pair(a, b, random_batches((5,)))


def test_the_endpoints_are_left_as_they_were(blocks: Pair):
    blocks.a.train()
    cast(Blocks, blocks.b).blocks[0].train()
    before = [copy.deepcopy(model.state_dict()) for model in (blocks.a, blocks.b)]
    flags = [[module.training for module in model.modules()] for model in (blocks.a, blocks.b)]
    needs = [[p.requires_grad for p in model.parameters()] for model in (blocks.a, blocks.b)]
    forwards = [module.__dict__.keys() for module in blocks.a.modules()]
    tensors = [p.data_ptr() for p in blocks.a.parameters()]
    blocks.search(checkpointing=True, init="best")
    for model, state in zip((blocks.a, blocks.b), before, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name
    assert [[m.training for m in model.modules()] for model in (blocks.a, blocks.b)] == flags
    assert [[p.requires_grad for p in model.parameters()] for model in (blocks.a, blocks.b)] == needs
    assert [module.__dict__.keys() for module in blocks.a.modules()] == forwards
    assert [p.data_ptr() for p in blocks.a.parameters()] == tensors
    assert all(p.grad is None for model in (blocks.a, blocks.b) for p in model.parameters())


def test_running_statistics_are_those_of_the_midpoint(blocks: Pair):
    found = blocks.search(steps=1)
    select = blocks.batches[-1:]
    assert found.objective == pytest.approx(blocks.excess(found.permutation, select), abs=1e-5)


def test_only_what_the_spec_moves_has_auxiliary_weights(blocks: Pair):
    ends = Ends(blocks.spec, blocks.a, blocks.b, OBJECTIVE, CPU)
    assert not {"unused", "head.bias", "scale"} & set(ends.free)
    assert not any("running" in name for name in ends.free)
    assert any("running" in name for name in ends.moved)
    middle = ends.midpoint(blocks.spec.random(1))
    assert middle["head.bias"] is ends.midpoint(blocks.spec.random(2))["head.bias"]


def test_checkpointing_gives_the_same_gradients_from_fewer_activations(blocks: Pair):
    def gradients(checkpointing: bool) -> tuple[int, dict[str, Tensor]]:
        ends = Ends(blocks.spec, blocks.a, blocks.b, OBJECTIVE, CPU)
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with ends.ready(checkpointing), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _, found = ends.gradient(ends.midpoint(blocks.spec.random(1)), blocks.batches[:1])
        return kept, found

    plain, expected = gradients(False)
    fewer, found = gradients(True)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    assert fewer != plain


def test_bfloat16_is_close(digits: Pair):
    exact, rough = digits.search(), digits.search(autocast="bf16")
    assert rough.start_objective == pytest.approx(exact.start_objective, rel=0.1)
    assert rough.objective <= rough.start_objective


def test_half_precision_endpoints(digits: Pair):
    narrow = [copy.deepcopy(model).to(torch.bfloat16) for model in (digits.a, digits.b)]
    batches = [(x.to(torch.bfloat16), y) for x, y in digits.batches]
    found = straight_through(digits.spec, narrow[0], narrow[1], OBJECTIVE, batches, steps=8, lr=5e-3)
    assert found.objective <= found.start_objective
    assert all(p.dtype == torch.bfloat16 for model in narrow for p in model.parameters())


def test_blocks_in_lists_are_found():
    assert len(list(midpoint._blocks(Blocks()))) == 3


# After an interruption --------------------------------------------------------------------------------------


class Scored(CrossEntropy):
    """Minus a reward, which may be negative, as that of images is."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return super().loss(model, batch) - 5

    def evaluate(self, model: nn.Module, batches: Any) -> dict[str, float]:
        found = super().evaluate(model, batches)
        return {**found, "loss": found["loss"] - 5}


def without_times(found: StraightThroughResult) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if not k.startswith("seconds")}
        return [plain(one) for one in value] if isinstance(value, list) else value

    return plain(found.to_dict())


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (OBJECTIVE, {"init": "best", "steps": 4, "schedule": "cosine", "refine": 3}),
        (OBJECTIVE, {"optimizer": "sgd", "lr": 0.5, "schedule": "constant", "momentum": 0.5, "refine": 9}),
        (OBJECTIVE, {"optimizer": "sgd", "lr": 30.0, "momentum": 0.0, "clip": 0.1, "evaluate_every": 3}),
        (
            OBJECTIVE,
            {"accumulate": 3, "project_every": 4, "evaluate_every": 2, "refine": 2, "init": "identity"},
        ),
        (
            OBJECTIVE,
            {"represents": "midpoint", "projection": "l2", "projection_sweeps": 1, "autocast": "bf16"},
        ),
        (Scored(), {"init": "activation_then_weight", "checkpointing": True, "refine": 2}),
    ],
)
def test_resumed_after_anything_it_ends_the_same_to_the_bit(
    digits: Pair, tmp_path: Path, objective: CrossEntropy, options: dict[str, Any]
):
    def search(**more: Any) -> StraightThroughResult:
        given: dict[str, Any] = {
            "init": "weight_matching",
            "schedule": "cosine",
            "evaluate_every": 1,
            "refine": 0,
        }
        given |= {"steps": 8, "lr": 2e-2, **options, **more}
        return straight_through(digits.spec, digits.a, digits.b, objective, digits.batches, **given)

    paths: list[Path] = []

    def keep(state: StraightThroughState) -> None:
        paths.append(tmp_path / f"{len(paths)}.safetensors")
        state.save(paths[-1])

    whole = search(checkpoint=keep)
    starts = len(candidates(options.get("init", "weight_matching")))
    assert len(paths) == starts + len(whole.history) and len({step.moved for step in whole.history}) > 1
    for path in paths:
        state = StraightThroughState.load(path)
        found = search(resume_from=state)
        assert found.permutation == whole.permutation
        assert without_times(found) == without_times(whole)
        assert found.seconds > state.seconds > 0
    last = StraightThroughState.load(paths[-1])
    assert not last.auxiliary or not options.get("refine"), "after the steps there is nothing large to keep"


def test_a_resumed_search_can_be_interrupted_again(digits: Pair, tmp_path: Path):
    options: dict[str, Any] = {"steps": 6, "lr": 2e-2, "refine": 2}
    whole, path, state, runs = digits.search(**options), tmp_path / "state", None, 0

    def stop(made: StraightThroughState) -> None:
        made.save(path)
        raise KeyboardInterrupt

    while True:
        try:
            found = digits.search(**options, checkpoint=stop, resume_from=state)
            break
        except KeyboardInterrupt:
            state, runs = StraightThroughState.load(path), runs + 1
    assert runs == 1 + len(whole.history) and without_times(found) == without_times(whole)


def test_only_the_same_search_can_be_continued(digits: Pair, small: Pair, tmp_path: Path):
    states: list[StraightThroughState] = []
    digits.search(steps=2, checkpoint=states.append)
    for options, word in (
        ({"seed": 1}, "seed"),
        ({"steps": 3}, r"steps differed \(2 then, 3 now\)"),
        ({"lr": 1.0}, "lr"),
        ({"init": digits.spec.identity()}, "init"),
        ({"batches": digits.batches[:-1]}, "batches"),
    ):
        with pytest.raises(ConfigError, match=f"straight-through search can't be continued: its {word}"):
            digits.search(**{"steps": 2, **options}, resume_from=states[0])
    with pytest.raises(ConfigError, match="its architecture differed"):
        small.search(steps=2, resume_from=states[0])
    other = Pair(digits.b, digits.a, digits.batches)
    other.b = copy.deepcopy(digits.b)
    with pytest.raises(ConfigError, match="its weights differed"):
        other.search(steps=2, resume_from=states[0])
    with pytest.raises(ConfigError, match="its objective differed"):
        straight_through(
            digits.spec, digits.a, digits.b, Scored(), digits.batches, steps=2, lr=5e-3, resume_from=states[0]
        )


# What it says to mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"steps": 0}, ConfigError, "steps is 0"),
        ({"project_every": 0}, ConfigError, "project_every is 0"),
        ({"accumulate": 0}, ConfigError, "accumulate is 0"),
        ({"lr": -1.0}, ConfigError, "lr is -1.0"),
        ({"lr": math.nan}, ConfigError, "lr is nan"),
        ({"momentum": 1.5}, ConfigError, "momentum is 1.5"),
        ({"optimizer": "lion"}, ConfigError, "choose one of adam, sgd"),
        ({"schedule": "step"}, ConfigError, "constant, cosine"),
        ({"represents": "a"}, ConfigError, "b_endpoint, midpoint"),
        ({"projection": "cosine"}, ConfigError, "inner_product, l2"),
        ({"autocast": "fp8"}, ConfigError, "bf16"),
        ({"init": "guess"}, ConfigError, "weight_matching"),
        ({"batches": []}, DataError, "at least one batch"),
        ({"heldout": []}, DataError, "at least one batch"),
    ],
)
def test_bad_options_end_in_one_sentence(small: Pair, options: dict, error: type[RebasinError], words: str):
    with pytest.raises(error, match=words) as raised:
        small.search(**options)
    assert str(raised.value).count("\n") == 0 and str(raised.value).endswith(".")


def test_models_that_do_not_fit(small: Pair):
    other = MLP(inputs=5, width=9, depth=2, classes=3)
    with pytest.raises(SpecMismatchError, match=r"shape \(9, 5\)"):
        straight_through(small.spec, small.a, other, OBJECTIVE, small.batches, steps=1)
    foreign = rebasin.trace(other, small.batches[0][0][:2])
    with pytest.raises(SpecMismatchError, match="another architecture"):
        small.search(init=foreign.identity())
    broken = copy.deepcopy(small.a)
    with torch.no_grad():
        next(broken.parameters())[0, 0] = math.nan
    with pytest.raises(RebasinError, match="finite number"):
        straight_through(small.spec, small.a, broken, OBJECTIVE, small.batches, steps=1)


def test_an_objective_that_diverges_is_told(small: Pair):
    class Steep(CrossEntropy):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return super().loss(model, batch) * math.inf

    with pytest.raises(ConfigError, match="not finite"):
        straight_through(small.spec, small.a, small.b, Steep(), small.batches, steps=2)

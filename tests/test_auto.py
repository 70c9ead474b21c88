"""`auto_matching`: the best of several alignments by the loss on the line, never worse than naive."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rebasin
from rebasin.errors import ConfigError, DataError
from rebasin.matching import AutoMapsResult, AutoState, auto_alignment, naive
from rebasin.matching import candidates as CANDIDATES
from rebasin.matching.candidates import Comparison, candidates
from rebasin.models import MLP
from rebasin.objectives import CrossEntropy
from rebasin.tensors.modules import loaded

STRUCTURES = ("mlp", "convolutions", "batchnorm")


class Convolutions(nn.Module):
    """Two convolutions with a norm between them; inputs are rows of 16 numbers, as the MLP's."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 6, 3, padding=1), norm
        self.second, self.head = nn.Conv2d(6, 6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.norm(self.first(x.reshape(-1, 1, 4, 4))).relu()
        return self.head(self.second(found).relu().mean((2, 3)))


def made(structure: str) -> nn.Module:
    if structure == "mlp":
        return MLP(inputs=16, width=8, depth=2, classes=3)
    return Convolutions(nn.BatchNorm2d(6) if structure == "batchnorm" else nn.GroupNorm(3, 6))


class Pair:
    """Two networks that were trained apart for a moment, and data."""

    def __init__(self, structure: str) -> None:
        x = torch.randn(240, 16, generator=torch.Generator().manual_seed(5))
        self.batches = [(rows, rows[:, :3].argmax(1)) for rows in x.split(24)]
        self.ends = self.trained(structure, 0), self.trained(structure, 1)
        self.spec = rebasin.trace(self.ends[0], x[:2])

    def trained(self, structure: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = made(structure)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for x, y in self.batches * 8:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model.eval()

    def auto(self, function: Any = rebasin.auto_matching, **options: Any) -> Any:
        batches = options.pop("batches", self.batches)
        return function(self.spec, *self.ends, options.pop("objective", CrossEntropy()), batches, **options)

    def above(self, result: Any, points: int) -> float:
        """The largest loss above the line on the batches that select, measured by `rebasin.barrier`."""
        a, b = (model.state_dict() for model in self.ends)
        select = self.batches[-2:]

        def evaluate(model: nn.Module) -> float:
            return CrossEntropy().evaluate(model, select)["loss"]

        curve = rebasin.barrier(self.ends[0], a, result.as_alignment.apply(b), evaluate, points=points + 2)
        ends = curve.losses[0], curve.losses[-1]
        inside = list(zip(curve.lambdas, curve.losses, strict=True))[1:-1]
        return max(loss - (1 - share) * ends[0] - share * ends[1] for share, loss in inside)


@pytest.fixture(scope="module", params=STRUCTURES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


@pytest.fixture(scope="module")
def mlp() -> Pair:
    return Pair("mlp")


@pytest.mark.parametrize("points", [1, 3])
def test_the_best_by_the_line_and_never_worse_than_naive(pair: Pair, points: int) -> None:
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in pair.ends]
    found = pair.auto(points=points)
    names = [row.name for row in found.tried]
    assert names == ["naive", *map(str, candidates()[1:])] and not any(row.why for row in found.tried)
    losses = {row.name: row.loss for row in found.tried}
    assert found.objective == losses[found.chosen] == min(losses.values()) <= losses["naive"]
    assert found.initial_objective == losses["naive"] == pytest.approx(pair.above(not_aligned(pair), points))
    assert found.objective == pytest.approx(pair.above(found, points), abs=1e-6)
    assert found.chosen != "naive", "these pairs have something to gain"
    for model, state in zip(pair.ends, before, strict=True):
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def not_aligned(pair: Pair) -> Any:
    return naive(pair.spec, *(model.state_dict() for model in pair.ends))


class Backwards(CrossEntropy):
    """Activations are the same, but what moves B loses: any other output than A's or B's own mean is a reward."""

    def evaluate(self, model: nn.Module, batches: Any) -> dict[str, float]:
        found = super().evaluate(model, batches)
        return {**found, "loss": -found["loss"]}


def test_where_everything_is_worse_naive_stays(mlp: Pair) -> None:
    found = mlp.auto(objective=Backwards())
    assert found.chosen == "naive" and found.moved == 0
    assert all(row.loss > found.objective for row in found.tried[1:])


def test_a_planted_permutation_is_found_whatever_hides_it(pair: Pair) -> None:
    a = pair.ends[0]
    planted = loaded(a, pair.spec.random(seed=3).apply(a.state_dict())).eval()
    found = rebasin.auto_matching(pair.spec, a, planted, CrossEntropy(), pair.batches)
    assert abs(found.objective) < 1e-5 < found.initial_objective
    back = found.permutation.apply(planted.state_dict())
    assert all(torch.allclose(back[k].double(), v.double(), atol=1e-6) for k, v in a.state_dict().items())
    assert any(row.same_as for row in found.tried), "what is found twice is measured once"


def test_a_candidate_that_fails_is_told_and_left_out(mlp: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise DataError("This one can't.")

    whole = mlp.auto()
    monkeypatch.setitem(CANDIDATES.ACTIVATIONS, whole.chosen, (fail, {}))
    found = mlp.auto()
    told = {row.name: row for row in found.tried}[whole.chosen]
    assert told.why == "This one can't." and math.isnan(told.loss) and found.chosen != whole.chosen
    started = rebasin.straight_through(mlp.spec, *mlp.ends, CrossEntropy(), mlp.batches, steps=1, refine=0)
    assert [row.why for row in started.tried if row.why] == ["This one can't."]

    monkeypatch.setattr(CANDIDATES, "weight_matching", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # an error that is no sentence of ours is a fault, and not hidden
        mlp.auto()


def test_a_loss_that_is_no_number_never_wins() -> None:
    losses = iter([0.5, math.nan, -math.inf, 0.4])
    compared = Comparison(lambda _: next(losses))
    spec = rebasin.trace(nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1)), torch.zeros(1, 2))
    for number in range(4):
        compared.add(str(number), lambda n=number: spec.random(seed=n), spec.identity())
    assert compared.best == 3


def test_without_data_nobody_has_looked(mlp: Pair) -> None:
    found = rebasin.auto_matching(mlp.spec, *mlp.ends)
    plain = rebasin.weight_matching(mlp.spec, *(model.state_dict() for model in mlp.ends))
    assert found.permutation == plain.permutation and found.points == 0 and found.chosen == "weight_matching"
    assert mlp.auto(batches=[]).points == 0


@pytest.mark.parametrize("ste", [False, True])
def test_searches_join_in_and_are_no_worse(mlp: Pair, ste: bool) -> None:
    plain = mlp.auto()
    found = mlp.auto(auto_alignment, ste=ste, search_steps=3)
    names = [row.name for row in found.tried]
    assert names == [row.name for row in plain.tried] + ["straight_through"] * ste + ["learned"]
    assert isinstance(found, AutoMapsResult) and found.objective <= plain.objective
    assert (found.chosen == "learned") == bool(found.as_alignment.maps)


@pytest.mark.parametrize("options", [{}, {"ste": True, "search_steps": 3}])
def test_resumed_anywhere_it_ends_the_same_to_the_bit(
    mlp: Pair, tmp_path: Path, options: dict[str, Any]
) -> None:
    function = auto_alignment if options else rebasin.auto_matching
    paths: list[Path] = []

    def keep(state: AutoState) -> None:
        paths.append(tmp_path / f"{len(paths)}.safetensors")
        state.save(paths[-1])

    whole = mlp.auto(function, checkpoint=keep, **options)
    assert len(paths) >= len(candidates())
    for path in paths[:: 1 if not options else 5]:
        state = AutoState.load(path)
        again = mlp.auto(function, resume_from=state, **options)
        assert [(row.name, row.loss, row.moved) for row in again.tried] == [
            (row.name, row.loss, row.moved) for row in whole.tried
        ]
        assert again.permutation == whole.permutation and again.objective == whole.objective
    with pytest.raises(ConfigError, match="its points differed"):
        mlp.auto(function, resume_from=AutoState.load(paths[0]), points=2, **options)


def test_what_it_tells_while_it_works(mlp: Pair) -> None:
    events: list[dict[str, Any]] = []
    found = mlp.auto(progress=events.append)
    own = [event for event in events if event["stage"] == "candidates"]
    assert [event["step"] for event in own] == list(range(1, len(found.tried) + 1))
    assert own[-1]["objective"] == found.objective and own[-1]["permutation"] == found.permutation
    objectives = [event["objective"] for event in own]
    assert objectives == sorted(objectives, reverse=True)


def test_searches_start_at_the_best(mlp: Pair) -> None:
    """The midpoint alone is what the straight-through estimator goes by."""
    auto = mlp.auto(points=1)
    ste = rebasin.straight_through(mlp.spec, *mlp.ends, CrossEntropy(), mlp.batches, steps=1, refine=0)
    assert ste.start_objective == pytest.approx(auto.objective, abs=1e-7)
    assert [(row.name.replace("identity", "naive"), row.moved) for row in ste.tried] == [
        (row.name, row.moved) for row in auto.tried
    ]
    assert [row.loss for row in ste.tried] == pytest.approx([row.loss for row in auto.tried], abs=1e-7)

"""Large assignments through their promising entries: always the dense solver's value, and a proof."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rebasin.matching import candidates
from rebasin.matching.linear import linear_assignment

N = 300


def solve(
    costs: Tensor, prices: Tensor | None = None, balance: bool = True
) -> tuple[np.ndarray, Tensor] | None:
    start = (costs.mean(dim=0) if prices is None else prices).to(costs)
    return candidates.by_candidates(costs, start, start - costs, balance)


def problem(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    a = drawn(N, 64)
    if kind == "planted":
        costs = a @ (a[torch.randperm(N, generator=generator)] + drawn(N, 64)).T
    elif kind == "random":
        costs = drawn(N, N)
    elif kind == "low rank":
        costs = drawn(N, 8).relu() @ drawn(N, 8).relu().T
    elif kind == "shifted":  # columns of very different worth
        costs = drawn(N, N) + 30 * drawn(N)
    elif kind == "dead":  # a third of the rows and columns are nothing
        costs = drawn(N, N)
        costs[: N // 3] = 0
        costs[:, N // 2 :] = 0
    else:
        costs = torch.randint(0, 4, (N, N), generator=generator).float()
    return costs.to(dtype)


def value(costs: Tensor, column: np.ndarray) -> float:
    return float(costs.double().numpy()[np.arange(N), column].sum())


def best(costs: Tensor) -> float:
    return value(costs, linear_sum_assignment(costs.double().numpy(), maximize=True)[1])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["planted", "random", "low rank", "shifted"])
def test_the_value_is_the_best_and_the_prices_prove_it(kind: str, dtype: torch.dtype) -> None:
    costs = problem(kind, dtype)
    expected = best(costs)
    generator = torch.Generator().manual_seed(0)
    for start in (None, torch.randn(N, generator=generator), 100 * torch.randn(N, generator=generator)):
        for balance in (True, False):
            solved = solve(costs, start, balance)
            if solved is None:
                assert start is not None  # so bad a start may be given up on, its own never
                continue
            column, prices = solved
            assert sorted(column) == list(range(N))
            assert value(costs, column) == pytest.approx(expected, rel=1e-11)
            left = costs.double() - prices
            own = left[torch.arange(N), torch.from_numpy(column)]
            assert float((left.amax(dim=1) - own).max()) <= 1e-10 * float(
                costs.abs().max() + prices.abs().max()
            )


@pytest.mark.parametrize("kind", ["ties", "dead"])
def test_ties_are_solved_or_left_to_the_dense_solver(kind: str) -> None:
    costs = problem(kind)
    solved = solve(costs)
    assert solved is None or value(costs, solved[0]) == best(costs)
    column, reached, _ = linear_assignment(costs)
    assert sorted(column) == list(range(N))
    assert reached == pytest.approx(best(costs), rel=1e-12)


def test_what_the_first_candidates_lack_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = problem("random")
    rounds: list[int] = []
    inner = candidates._tempting

    def counted(*arguments: object) -> Tensor:
        found = inner(*arguments)  # pyright: ignore[reportArgumentType]
        rounds.append(found.numel())
        return found

    monkeypatch.setattr(candidates, "_tempting", counted)
    monkeypatch.setattr(candidates, "PER_ROW", 4)
    monkeypatch.setattr(candidates, "BALANCING", 1)
    monkeypatch.setattr(candidates, "MOST_PER_ROW", N)
    solved = solve(costs)
    assert solved is not None
    assert value(costs, solved[0]) == pytest.approx(best(costs), rel=1e-11)
    assert len(rounds) > 1
    assert rounds[0] > 0
    assert rounds[-1] == 0


def test_a_coarse_solution_is_never_taken_for_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    # With so few steps the sparse solver often takes a worse assignment; then there is no proof.
    monkeypatch.setattr(candidates, "STEPS", 8)
    refused = 0
    for seed in range(6):
        costs = torch.randn(N, N, generator=torch.Generator().manual_seed(seed))
        solved = solve(costs)
        refused += solved is None
        assert solved is None or value(costs, solved[0]) == pytest.approx(best(costs), rel=1e-11)
        assert linear_assignment(costs)[1] == pytest.approx(best(costs), rel=1e-11)
    assert refused


def test_learned_prices_make_a_similar_problem_easier(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = problem("random")
    learned: list[Tensor] = []
    column = linear_assignment(costs, learn=learned.append)[0]
    assert len(learned) == 1
    similar = costs + 0.01 * torch.randn(N, N, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(candidates, "_balance", lambda regret: pytest.fail("balanced again"))
    again, reached, _ = linear_assignment(similar, lambda: learned[0], learn=learned.append)
    assert reached == pytest.approx(best(similar), rel=1e-11)
    assert int((again == column).sum()) > N / 2
    assert linear_assignment(costs, lambda: learned[0])[0].tolist() == column.tolist()

"""Linear assignments: always scipy's value, whatever the duals they start from, and a proof."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rebasin.matching.assignment import jonker_volgenant
from rebasin.matching.assignment.jonker_volgenant import LANES, solve
from rebasin.matching.assignment.linear_assignment import SMALLEST, linear_assignment, stays

SIZES = [1, 2, 33, LANES - 1, LANES, LANES + 1, 150]
KINDS = ["planted", "random", "low rank", "shifted", "ties", "dead", "rows alike", "nothing"]


def problem(kind: str, n: int, seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    costs = rng.standard_normal((n, n))
    if kind == "planted":
        a = rng.standard_normal((n, 64))
        costs = a @ (a[rng.permutation(n)] + rng.standard_normal((n, 64))).T
    elif kind == "low rank":  # long chains of exchanges
        costs = rng.standard_normal((n, 8)) @ rng.standard_normal((n, 8)).T
    elif kind == "shifted":  # columns of very different worth
        costs += 30 * rng.standard_normal(n)
    elif kind == "ties":
        costs = rng.integers(0, 4, (n, n)).astype(float)
    elif kind == "dead":  # a third of the rows and half of the columns are nothing
        costs[: n // 3] = 0
        costs[:, n // 2 :] = 0
    elif kind == "rows alike":
        costs[:] = costs[0]
    elif kind == "nothing":
        costs[:] = 0
    return costs


def in_a_new_process(*lines: str) -> None:
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def value(costs: np.ndarray, column: np.ndarray) -> float:
    return float(costs[np.arange(len(costs)), column].sum(dtype=np.float64))


def best(costs: np.ndarray) -> float:
    return value(costs, linear_sum_assignment(costs, maximize=True)[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_value_is_the_best_and_the_prices_prove_it(kind: str, n: int, dtype: type) -> None:
    costs = problem(kind, n).astype(dtype)
    rng = np.random.default_rng(0)
    for start in (None, np.zeros(n), rng.standard_normal(n), 100 * rng.standard_normal(n), costs.max(axis=0)):
        column, duals = solve(costs, start)
        assert sorted(column) == list(range(n))
        assert value(costs, column) == pytest.approx(best(costs), rel=1e-12, abs=1e-12)
        left = costs.astype(np.float64) - duals
        regret = left.max(axis=1) - left[np.arange(n), column]
        assert regret.max() <= 1e-12 * (np.abs(costs).max() + np.abs(duals).max())


@pytest.mark.parametrize(
    "settings",
    [
        {"HARD": 1.0, "BIDS": 0, "ROUNDS": 1},
        {"HARD": 1.0, "BIDS": 1, "ROUNDS": 1},
        {"HARD": 1.0, "BIDS": 50, "ROUNDS": 4},
        {"HARD": -1.0, "ROUNDS": 0},
        {"HARD": -1.0, "STEPS": (1.0,), "PATIENCE": 0},
        {"HARD": -1.0, "STEPS": (1e-9, 10.0), "PATIENCE": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_auctions_bids_and_paths_share_the_work_as_they_like(
    kind: str, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, setting in settings.items():
        monkeypatch.setattr(jonker_volgenant, name, setting)
    costs = problem(kind, 70)
    assert value(costs, solve(costs)[0]) == pytest.approx(best(costs), rel=1e-12, abs=1e-12)


def test_neither_the_costs_nor_the_given_prices_are_changed() -> None:
    costs = problem("random", 150)
    duals = solve(costs)[1]
    before, then = costs.copy(), duals.copy()
    solve(costs, duals)
    linear_assignment(torch.from_numpy(costs), torch.from_numpy(duals))
    assert np.array_equal(costs, before)
    assert np.array_equal(duals, then)


def test_costs_need_not_lie_in_order() -> None:
    costs = problem("random", 64)
    assert solve(costs.T)[0].tolist() == linear_sum_assignment(costs.T, maximize=True)[1].tolist()
    assert (
        solve(costs[::2, ::2])[0].tolist()
        == linear_sum_assignment(costs[::2, ::2], maximize=True)[1].tolist()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [SMALLEST - 1, SMALLEST, 300])
def test_the_solver_is_chosen_by_the_size_and_the_answer_is_the_same(kind: str, n: int) -> None:
    costs = torch.from_numpy(problem(kind, n)).float()
    learned: list[Tensor] = []
    column, reached, gain = linear_assignment(costs, learn=learned.append)
    assert sorted(column) == list(range(n))
    assert reached == pytest.approx(best(costs.numpy()), rel=1e-10, abs=1e-10)
    assert gain == pytest.approx(reached - float(costs.double().trace()), rel=1e-9, abs=1e-9)
    easy = len(set(costs.argmax(dim=1).tolist())) == n
    assert len(learned) == (n >= SMALLEST and not easy)
    for duals in learned:
        assert linear_assignment(costs, duals)[1] == pytest.approx(reached, rel=1e-12)


def test_learned_prices_leave_hardly_anything_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = problem("low rank", 300).astype(np.float32)
    column, duals = solve(costs)
    similar = costs + 1e-3 * problem("random", 300).astype(np.float32)
    left_over: list[int] = []
    bid = jonker_volgenant._bid.py_func

    def counted(*arguments: Any) -> np.ndarray:
        left = bid(*arguments)
        left_over.append(len(left))
        return left

    monkeypatch.setattr(jonker_volgenant, "_bid", counted)
    afresh = jonker_volgenant._solve.py_func(similar, np.zeros(300), 1.0, np.zeros(0), 0, 2, 1)
    again = jonker_volgenant._solve.py_func(similar, duals.copy(), 1.0, np.zeros(0), 0, 2, 1)
    assert value(similar, afresh) == pytest.approx(value(similar, again), rel=1e-12)
    assert (again == column).mean() > 0.5
    assert len(left_over) == 4  # two rounds each, of which the second leaves the rows for paths
    assert left_over[3] < left_over[1] / 2
    assert left_over[2] < left_over[0] / 2


def test_prices_are_taken_if_they_bound_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = problem("shifted", 150)
    duals = solve(costs)[1]
    starts: list[np.ndarray] = []
    inner = jonker_volgenant._solve

    def noted(costs: np.ndarray, start: np.ndarray, *arguments: Any) -> np.ndarray:
        starts.append(start.copy())
        return inner(costs, start, *arguments)

    monkeypatch.setattr(jonker_volgenant, "_solve", noted)
    one_bargain = np.zeros(150)
    one_bargain[7] = -1e6
    for given in (duals, one_bargain, None):
        assert value(costs, solve(costs, given)[0]) == pytest.approx(best(costs), rel=1e-12)
    assert np.array_equal(starts[0], duals)
    assert not starts[1].any()
    assert not starts[2].any()


def test_duals_prove_that_all_stay_without_a_solution() -> None:
    costs = torch.from_numpy(problem("low rank", 90))
    column, duals = (torch.from_numpy(found) for found in solve(costs.numpy()))
    settled = costs[:, column]  # the best assignment is the identity
    assert stays(settled, duals[column])
    assert not stays(costs, duals)
    assert not stays(settled, torch.zeros(90))
    assert not stays(settled + torch.eye(90).roll(1, 0), duals[column])


def test_numba_is_loaded_only_where_it_is_needed_and_threads_may_be_the_first_to_solve() -> None:
    in_a_new_process(
        "import sys, torch",
        "from concurrent.futures import ThreadPoolExecutor",
        "from scipy.optimize import linear_sum_assignment",
        "from rebasin.matching.assignment.linear_assignment import linear_assignment",
        "linear_assignment(torch.eye(300))",
        "linear_assignment(torch.rand(20, 20))",
        "assert 'numba' not in sys.modules",
        "torch.manual_seed(0)",
        "costs = [torch.rand(150, 150) for _ in range(12)]",
        "with ThreadPoolExecutor(4) as pool:",
        "    found = list(pool.map(linear_assignment, costs))",
        "assert 'numba' in sys.modules",
        "for c, (column, _, _) in zip(costs, found, strict=True):",
        "    assert column.tolist() == linear_sum_assignment(c.numpy(), maximize=True)[1].tolist()",
    )


NO_NUMBA = """
import sys, warnings
import numpy as np, torch
from scipy.optimize import linear_sum_assignment
{hide}
from rebasin.matching.assignment.linear_assignment import linear_assignment

torch.manual_seed(0)
learned = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for dtype in (torch.float32, torch.float64, torch.float32):
        costs = torch.randn(200, 200, dtype=dtype)
        best = linear_sum_assignment(costs.numpy(), maximize=True)[1]
        for prices in (None, torch.zeros(200)):
            column, value, gain = linear_assignment(costs, prices, learn=learned.append)
            assert column.dtype == np.int64 and column.tolist() == best.tolist() and gain > 0
told = [str(warning.message) for warning in caught if "numba" in str(warning.message)]
assert len(told) == 1 and told[0].startswith("numba does not work here ({reason}"), told
assert not learned
"""


HIDDEN = {
    "ModuleNotFoundError: ": "sys.modules['numba'] = None",
    "FileNotFoundError: ": "import numba; numba.njit = lambda **_: lambda f: open('/nowhere/machine code')",
    "ZeroDivisionError: ": "import numba; numba.njit = lambda **_: lambda f: lambda *a: 1 / 0",
}
"""Not installed, does not load, does not run."""

EACH = """
import os, sys, traceback
import numpy, scipy.optimize, torch
for script in {scripts!r}:  # in a process of its own, with what takes long imported
    child = os.fork()
    if child == 0:
        try:
            exec(script, {{}})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, script
"""


NOWHERE = """
from numba.core.caching import CacheImpl
CacheImpl._locator_classes = []
from rebasin.matching.assignment import jonker_volgenant
assert type(jonker_volgenant._solve._cache).__name__ == "NullCache"
"""


def test_without_numba_scipy_solves_all_after_one_warning_and_machine_code_is_kept_where_it_can_be() -> None:
    assert type(jonker_volgenant._solve._cache).__name__ == "FunctionCache"
    scripts = [
        NO_NUMBA.replace("{hide}", hide).replace("{reason}", reason) for reason, hide in HIDDEN.items()
    ]
    in_a_new_process(EACH.format(scripts=[NOWHERE, *scripts]))

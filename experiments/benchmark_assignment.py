"""How fast single linear assignments are solved: ours (rebasin/matching/jonker_volgenant.py), scipy's, and lapx's.

    python -m experiments.benchmark_assignment                              # lapx too, if it is installed
    python -m experiments.benchmark_assignment --sizes 5120 10240 --alone   # without the others

The costs are those of matching two networks that have nothing to do with each other, the hardest there are: `gaussian`
weights, `unequal` norms of neurons and of inputs, `flat` networks (8 dimensions), and `dead` neurons (a third of them).
`again` starts from the duals that solved costs which differ by a hundredth. All have to reach the same value. Seconds
are the best of --repeats calls; numba's compiling, once for an installation, is told apart. Writes assignment.json and
assignment.md to --out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import numpy as np
from scipy.optimize import linear_sum_assignment


def costs_of(kind: str, n: int, seed: int) -> np.ndarray:
    """float32 [n, n]."""
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((n, 8 if kind == "flat" else 2 * n), dtype=np.float32) for _ in range(2))
    if kind == "unequal":
        a *= np.exp(rng.standard_normal(2 * n) + 0.5 * rng.standard_normal((n, 1)))
        b *= np.exp(0.5 * rng.standard_normal((n, 1)))
    if kind == "dead":
        a, b = (np.maximum(w, 0) * (rng.random((n, 1)) > 1 / 3) for w in (a, b))
    return (a @ b.T).astype(np.float32)


KINDS = ("gaussian", "unequal", "flat", "dead")


def timed(solve: Callable[[], np.ndarray], repeats: int) -> tuple[float, np.ndarray]:
    """The fewest seconds of a call, and its result."""
    best, column = np.inf, np.empty(0)
    for _ in range(repeats):
        began = perf_counter()
        column = solve()
        best = min(best, perf_counter() - began)
    return best, column


def measure(kind: str, n: int, seed: int, repeats: int, alone: bool) -> dict[str, float]:
    from rebasin.matching.assignment.jonker_volgenant import solve

    costs = costs_of(kind, n, seed)
    noise = np.random.default_rng(seed + 1).standard_normal((n, n), dtype=np.float32)
    duals = solve(costs * (1 + 0.01 * noise))[1]
    calls: dict[str, Callable[[], np.ndarray]] = {
        "ours": lambda: solve(costs)[0],
        "again": lambda: solve(costs, duals)[0],
    }
    if not alone:
        calls["scipy"] = lambda: linear_sum_assignment(costs, maximize=True)[1]
        if find_spec("lap"):
            import lap  # pyright: ignore[reportMissingImports]

            calls["lapx"] = lambda: lap.lapjv(-costs.astype(np.float64), return_cost=False)[0]
    row: dict[str, float] = {}
    values = {}
    for name, call in calls.items():
        row[name], column = timed(call, repeats)
        values[name] = float(costs[np.arange(n), column].sum(dtype=np.float64))
    if max(values.values()) - min(values.values()) > 1e-9 * abs(values["ours"]):
        raise SystemExit(f"{kind} {n}: the values differ: {values}")
    return row


def main() -> None:
    described = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    described.add_argument("--sizes", nargs="+", type=int, default=[512, 1280, 2560])
    described.add_argument(
        "--alone", action="store_true", help="without the others, which take minutes from 5,000 on"
    )
    described.add_argument("--repeats", type=int, default=3)
    described.add_argument("--seed", type=int, default=0)
    described.add_argument("--out", type=Path, default=Path("outputs/benchmark_assignment"))
    options = described.parse_args()
    began = perf_counter()
    from rebasin.matching.assignment.jonker_volgenant import solve

    solve(np.zeros((4, 4), dtype=np.float32))
    print(f"loading, and compiling unless that was done before: {perf_counter() - began:.1f} s")
    rows = []
    for n in options.sizes:
        for kind in KINDS:
            seconds = measure(kind, n, options.seed, options.repeats, options.alone)
            rows.append({"n": n, "costs": kind, **seconds})
            print(
                "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items())
            )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "assignment.json").write_text(json.dumps(rows, indent=1))
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        lines.append(
            "| "
            + " | ".join(f"{1e3 * v:.3g} ms" if isinstance(v, float) else str(v) for v in row.values())
            + " |"
        )
    (options.out / "assignment.md").write_text("\n".join(lines) + "\n")
    print(f"Written to {options.out}.")


if __name__ == "__main__":
    main()

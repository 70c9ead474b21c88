"""Merge small tensors with sd-mecha and store the results: what tests/test_merge_mecha.py compares our methods with.

    pip install 'git-rebasin[mecha]' && python experiments/sd_mecha_reference.py tests/data/sd_mecha.json

Each case names our method, the models by number, what we give it, and sd-mecha's result in float64. Then the known
differences are printed: where we do something else on purpose, and how far apart the results are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sd_mecha.extensions.merge_methods import resolve  # pyright: ignore[reportMissingImports]
from torch import Tensor

from rebasin.merging import merge

torch.set_num_threads(1)
SHAPE = (6, 4)


def mecha(name: str, *tensors: Tensor, **options: Any) -> Tensor:
    """A method of sd-mecha on the tensors of one name."""
    method = resolve(name)
    names, kinds = method.get_param_names(), method.get_input_types()
    of = {**dict(zip(names.args, kinds.args, strict=True)), **dict(kinds.kwargs)}
    many = [kinds.vararg] * len(tensors)
    given = [
        {"w": t.clone()} if "StateDict" in str(kind) else t.clone()
        for t, kind in zip(tensors, [*kinds.args[: len(tensors)], *many], strict=False)
    ]
    defaults = dict(zip(names.args[::-1], method.get_default_args().args[::-1], strict=False))
    settings = {
        key: torch.tensor(value, dtype=torch.float64) if of[key] is Tensor else value
        for key, value in (defaults | options).items()
    }
    if method.has_varkwargs:
        settings |= {"key": "w", "cache": None}
    return method.__wrapped__(*given, **settings)


def cases(m: list[Tensor]) -> list[tuple[str, list[int], int | None, dict[str, Any], Tensor]]:
    """Our method, models, base, our options with weights, and what sd-mecha makes of them."""
    a, b, c, d = m[:4]
    near, close = m[4], m[5]
    found: list[tuple[str, list[int], int | None, dict[str, Any], Tensor]] = []

    def case(name: str, models: list[int], base: int | None, expected: Tensor, **ours: Any) -> None:
        found.append((name, models, base, ours, expected))

    case("weighted_sum", [0, 1], None, mecha("weighted_sum", a, b, alpha=0.3), weights=0.3)
    case("uniform_soup", [0, 1, 3], None, mecha("n_average", a, b, d))
    case("slerp", [0, 1], None, mecha("slerp", a, b, alpha=0.3), weights=0.3)
    case("add_difference", [0, 1], 2, mecha("add_difference", a, b - c, alpha=0.7), weights=0.7)
    clamped = mecha("clamp", mecha("add_difference", a, b - c, alpha=0.9), a, b)
    case("add_difference", [0, 1], 2, clamped, weights=0.9, clamp=True)
    perpendicular = a + 0.6 * mecha("perpendicular_component", a - c, b - c)
    case("perpendicular_component", [0, 1], 2, perpendicular, weights=0.6)
    case("geometric_sum", [0, 1], None, mecha("geometric_sum", a, b, alpha=0.3), weights=0.3)
    case("multiply_quotient", [0, 1], 2, mecha("multiply_quotient", a, b, c, alpha=0.7), weights=0.7)
    mask = mecha("train_difference_mask", a, b, c, alpha=0.7)
    case("train_difference", [0, 1], 2, a + (b - c) * mask, weights=0.7)
    for alpha in (0.1, 0.5):
        case("add_cosine_a", [0, 4], None, mecha("add_cosine_a", a, near, alpha=alpha), weights=alpha)
        case("add_cosine_b", [0, 4], None, mecha("add_cosine_b", a, near, alpha=alpha), weights=alpha)
    for vote, sign in (("count", False), ("mass", True)):
        ties = mecha("ties_sum", a - c, b - c, d - c, k=1.0, vote_sgn=sign)
        case("ties_sum", [0, 1, 3], 2, c + 0.8 * ties, weights=0.8, k=1.0, vote=vote)
    for offset in (0.0, 0.5, 0.75):
        case(
            "tensor_sum",
            [0, 1],
            None,
            mecha("tensor_sum", a, b, width=0.5, offset=offset),
            weights=0.5,
            offset=offset,
        )
    for width in (1.0, 0.5):
        case("top_k_tensor_sum", [0, 1], None, mecha("top_k_tensor_sum", a, b, width=width), weights=width)
    for tilt in (0.0, 0.4, 1.0):
        case(
            "crossover", [0, 1], None, mecha("crossover", a, b, alpha=0.6, tilt=tilt), weights=0.6, tilt=tilt
        )
    case("clip", [0, 1, 2], None, mecha("clamp", a, b, c))
    case("clip", [0, 1, 2, 3], None, mecha("clamp", a, b, c, d, stiffness=0.4), stiffness=0.4)
    case("model_stock", [4, 5], 2, c + mecha("model_stock", near - c, close - c), rows=True)
    case("geometric_median", [0, 1, 3], None, mecha("geometric_median", a, b, d))
    case("rotate", [0, 1], None, mecha("rotate", a, b))
    case("rotate", [0, 1], None, mecha("rotate", a, b, alpha=0.3), weights=0.3)
    case("rotate", [0, 1], None, mecha("rotate", a, b, alignment=0.5), alignment=0.5)
    case("rotate", [0, 1], 2, c + mecha("rotate", a - c, b - c, centralization=0.0), centralization=0.0)
    dare = mecha("dropout", a - c, probability=0.0)
    case("dropout", [0, 0], 2, c + 0.5 * dare, weights=0.5, probability=0.0)
    return found


def ours(name: str, models: list[Tensor], base: Tensor | None, **options: Any) -> Tensor:
    states = [{"w": t} for t in models]
    return merge(name, states, base=None if base is None else {"w": base}, **options)["w"]


def differences(m: list[Tensor]) -> list[tuple[str, Callable[[], tuple[Any, Any]]]]:
    """What we do otherwise on purpose: a sentence, and both results."""
    a, b, c, _ = m[:4]
    wide = [t.reshape(4, 6)[:2] for t in m]

    def kept(k: float) -> tuple[int, int]:
        theirs = mecha("ties_sum", a - c, k=k)
        mine = ours("ties_sum", [a, a], c, k=k) - c
        return int((mine.abs() > 1e-12).sum()), int((theirs != 0).sum())

    def window() -> tuple[int, int]:
        mine = ours("top_k_tensor_sum", [a, b], None, weights=0.25, offset=0.5)
        theirs = mecha("top_k_tensor_sum", a, b, width=0.25, offset=0.5)
        return int((mine != a).sum()), int((theirs != a).sum())

    def smallest() -> tuple[int, int]:
        x = c + 1 / 3  # not exact in float32
        return int((ours("ties_sum", [x, a], c, k=1.0) != c).sum()), int(
            (mecha("ties_sum", x - c) != 0).sum()
        )

    def turned() -> tuple[float, float]:
        x, y = wide[0], wide[1]
        mine = ours("rotate", [x, y], None, centralization=0.0)
        theirs = mecha("rotate", x, y, centralization=0.0)
        return float((mine - y).norm()), float((theirs - y).norm())

    def mean_of_dare() -> tuple[float, float]:
        zero, one = torch.zeros(100_000, dtype=torch.float64), torch.ones(100_000, dtype=torch.float64)
        theirs = mecha("dropout", one, one, probability=0.9, seed=0)
        return float(ours("dropout", [one, one + 0], zero).mean()), float(theirs.mean())

    def noise() -> tuple[float, float]:
        """Kept differences of DELLA by magnitude must have the mean of all, here 1.5."""
        x = torch.linspace(1, 2, 100_000, dtype=torch.float64)
        mine = ours("dropout", [x, x + 0], 0 * x, probability=0.5, window=1.0)
        theirs = mecha(
            "ties_sum_with_dropout", x, probability=0.5, della_eps=1.0, k=1.0, apply_stock=True, seed=0
        )
        return float(mine.mean()), float(theirs.mean())

    def stock() -> tuple[float, float]:
        """How far the differences are shrunk where their rows agree to different degrees."""
        x, y = m[4] - c, m[5] - c
        mine = ours("model_stock", [m[4], m[5]], c) - c
        theirs = mecha("model_stock", x, y)
        return float(mine.norm() / ((x + y) / 2).norm()), float(theirs.norm() / ((x + y) / 2).norm())

    return [
        ("ties_sum keeps so many of 24 differences at k = 0.5", lambda: kept(0.5)),
        ("values that ties_sum keeps of 24 at k = 1, float64", smallest),
        ("values that a quarter of 24 ranks, from the middle on, moves in top_k_tensor_sum", window),
        ("distance of rotate's result to B, wide matrix, no centring (smaller is better)", turned),
        ("mean of DARE's result of two equal differences of 1", mean_of_dare),
        ("mean after DELLA, window 1, of differences with mean 1.5", noise),
        (
            "length of model_stock's difference over that of the mean: t for each tensor, or for each row",
            stock,
        ),
    ]


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(4)]
    a, _, c, d = drawn
    drawn += [c + 0.5 * (a - c) + 0.2 * d, c + 0.4 * (a - c) + 0.25 * d]
    # Binary fractions are exact in float32, in which some methods of sd-mecha compare values.
    models = [t.mul(1024).round().div(1024) for t in drawn]
    content = {
        "made by": f"sd-mecha {version('sd-mecha')}, experiments/sd_mecha_reference.py",
        "models": [m.tolist() for m in models],
        "cases": [
            {
                "method": name,
                "models": chosen,
                "base": base,
                "options": options,
                "expected": expected.tolist(),
            }
            for name, chosen, base, options, expected in cases(models)
        ],
    }
    worst = 0.0
    for name, chosen, base, options, expected in cases(models):
        mine = ours(name, [models[i] for i in chosen], None if base is None else models[base], **options)
        gap = float((mine - expected).abs().max())
        worst = max(worst, gap)
        print(f"{name:26} {gap:.1e} {options}")
    print(f"largest difference where both should agree: {worst:.1e}")
    for sentence, compare in differences(models):
        mine, theirs = compare()
        print(f"{sentence}: ours {mine:.6g}, sd-mecha {theirs:.6g}")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

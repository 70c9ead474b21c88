"""Every merge method against its formula, written a second time in numpy, one tensor at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rebasin.errors import ConfigError
from rebasin.merging import METHODS, merge
from rebasin.merging.lazy import generator

Array = NDArray[np.float64]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call(
    name: str, models: Sequence[Tensor], base: Tensor | None = None, weight: Any = None, **options: Any
) -> Tensor:
    """A method's function on single tensors, with the same weights as `merge` gives it."""
    method = METHODS[name]
    supply: dict[str, Any] = {"models": list(models), "a": models[0], "b": models[-1], "base": base}
    supply["generator"] = generator(0, "w")
    if method.weight:
        supply[method.weight] = method.fit_weights(weight, len(models))
    return method.function(**{k: v for k, v in supply.items() if k in method.takes}, **options)


A, B, C, D = (drawn(seed, 4, 6) for seed in (1, 2, 3, 4))
a, b, c, d = (t.numpy() for t in (A, B, C, D))


def np_slerp(a: Array, b: Array, t: float) -> Array:
    la, lb = np.linalg.norm(a), np.linalg.norm(b)
    w = np.arccos((a / la * b / lb).sum())
    return (np.sin((1 - t) * w) * a / la + np.sin(t * w) * b / lb) / np.sin(w) * ((1 - t) * la + t * lb)


def np_perpendicular(a: Array, b: Array, c: Array, t: float) -> Array:
    x, y = (a - c).ravel(), (b - c).ravel()
    return a + t * (y - x * (x @ y) / (x @ x)).reshape(a.shape)


def np_cosine(a: Array, b: Array, t: float, whole: bool) -> Array:
    out = np.empty_like(a)
    everything = (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())
    for j in range(a.shape[1]):
        s = a[:, j] @ b[:, j] / np.sqrt((a[:, j] @ a[:, j]) * (b[:, j] @ b[:, j]))
        s = (s + everything) / 2 if whole else s
        k = 1 - min(max(s - t, 0), 1)
        out[:, j] = (1 - k) * a[:, j] + k * b[:, j]
    return out


def np_geometric(a: Array, b: Array, t: float) -> Array:
    return (a.astype(complex) ** (1 - t) * b.astype(complex) ** t).real


def np_quotient(a: Array, b: Array, c: Array, t: float) -> Array:
    p, q = np.log(np.abs(a / c)), np.log(np.abs(b / c))
    m = np.maximum(0, -p * q / np.maximum(np.abs(p), np.abs(q)) ** 2)
    return (a * (b.astype(complex) / c) ** (t * m)).real


def np_ties(models: list[Array], c: Array, k: float, count: bool) -> Array:
    deltas = []
    for m in models:
        delta = (m - c).ravel()
        keep = np.argsort(-np.abs(delta))[: round(k * delta.size)]
        trimmed = np.zeros_like(delta)
        trimmed[keep] = delta[keep]
        deltas.append(trimmed)
    out = np.zeros_like(deltas[0])
    for i in range(out.size):
        column = [delta[i] for delta in deltas]
        sign = np.sign(sum(np.sign(column)) if count else sum(column))
        agreeing = [x for x in column if x != 0 and np.sign(x) == sign]
        out[i] = np.mean(agreeing) if agreeing else 0
    return c + out.reshape(c.shape)


def np_top_k(a: Array, b: Array, width: float, offset: float) -> Array:
    n, flat = a.size, a.ravel()
    values = sorted(flat)
    rank_of = {v: i for i, v in enumerate(sorted(values, key=abs))}
    place = np.argsort(np.argsort(b.ravel()))  # the rank of each element of b
    start, end = round(offset * n), round((offset + width) * n)
    inside = set(range(start, min(end, n))) | set(range(0, max(end - n, 0)))
    return np.array(
        [values[place[i]] if rank_of[values[place[i]]] in inside else flat[i] for i in range(n)]
    ).reshape(a.shape)


def np_crossover(a: Array, b: Array, t: float, tilt: float) -> Array:
    """The same with the full transform: its filter is symmetric."""
    axes = [np.abs(np.fft.fftfreq(n)) / np.abs(np.fft.fftfreq(n)).max() for n in a.shape]
    f = np.sqrt(sum(g**2 for g in np.meshgrid(*axes, indexing="ij")) / a.ndim)
    ramp = np.clip((f + t - 1) / np.tan(np.pi * tilt / 2) + t, 0, 1) if tilt else 0
    share = ramp if tilt else (f > 1 - t).astype(float)
    return np.fft.ifftn((1 - share) * np.fft.fftn(a) + share * np.fft.fftn(b)).real


def np_distribution(a: Array, b: Array, c: Array, t: float, tilt: float) -> Array:
    order = np.argsort(c.ravel())
    x, y = np.fft.rfft(a.ravel()[order]), np.fft.rfft(b.ravel()[order])
    f = np.arange(len(x)) / len(x)
    share = np.clip((f - (1 - t)) / tilt + 0.5, 0, 1) if tilt else (f >= 1 - t).astype(float)
    out = np.empty(a.size)
    out[order] = np.fft.irfft((1 - share) * x + share * y, n=a.size)
    return out.reshape(a.shape)


def np_stock(models: list[Array], c: Array) -> Array:
    deltas = [m - c for m in models]
    n = len(deltas)
    cosines = [
        (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
        for i, x in enumerate(deltas)
        for y in deltas[i + 1 :]
    ]
    cos = max(np.mean(cosines), 0)
    return c + n * cos / (1 + (n - 1) * cos) * np.mean(deltas, axis=0)


def np_clip(x: Array, bounds: list[Array], s: float) -> Array:
    out = np.empty_like(x)
    for i in np.ndindex(*x.shape):
        here = sorted(bound[i] for bound in bounds)
        mean = np.mean(here)
        low = (1 - s) * here[0] + s * max(v for v in here if v <= mean)
        high = (1 - s) * here[-1] + s * min(v for v in here if v >= mean)
        out[i] = min(max(x[i], low), high)
    return out


def np_train(a: Array, b: Array, c: Array, t: float) -> Array:
    return a + 1.8 * t * np.abs(b - a) / (np.abs(b - a) + np.abs(b - c)) * (b - c)


def rows_from_b(*rows: int) -> Array:
    out = a.copy()
    out[list(rows)] = b[list(rows)]
    return out


near = c + 0.3 * np.tanh(a - c)  # differences that agree, so that Model Stock's t is not 0
close = c + 0.3 * np.tanh(a - c) + 0.1 * d
NEAR, CLOSE = torch.from_numpy(near), torch.from_numpy(close)

GOLDEN: list[tuple[str, Callable[[], Tensor], Array]] = [
    ("weighted_sum", lambda: call("weighted_sum", [A, B], weight=0.3), 0.7 * a + 0.3 * b),
    (
        "weighted_sum",
        lambda: call("weighted_sum", [A, B, C], weight=[2, 1, 1]),
        0.5 * a + 0.25 * b + 0.25 * c,
    ),
    ("add_difference", lambda: call("add_difference", [A, B], C, 0.4), a + 0.4 * (b - c)),
    (
        "add_difference",
        lambda: call("add_difference", [A, B, D], C, [0.4, 2.0]),
        a + 0.4 * (b - c) + 2 * (d - c),
    ),
    (
        "add_difference",
        lambda: call("add_difference", [A, B], C, 0.9, clamp=True),
        np.clip(a + 0.9 * (b - c), np.minimum(a, b), np.maximum(a, b)),
    ),
    ("slerp", lambda: call("slerp", [A, B], weight=0.3), np_slerp(a, b, 0.3)),
    (
        "perpendicular_component",
        lambda: call("perpendicular_component", [A, B], C, 0.7),
        np_perpendicular(a, b, c, 0.7),
    ),
    ("add_cosine_a", lambda: call("add_cosine_a", [A, B], weight=0.1), np_cosine(a, b, 0.1, False)),
    ("add_cosine_a", lambda: call("add_cosine_a", [A, A + B], weight=0.1), np_cosine(a, a + b, 0.1, False)),
    ("add_cosine_b", lambda: call("add_cosine_b", [A, A + B], weight=0.2), np_cosine(a, a + b, 0.2, True)),
    ("geometric_sum", lambda: call("geometric_sum", [A, B], weight=0.3), np_geometric(a, b, 0.3)),
    ("multiply_quotient", lambda: call("multiply_quotient", [A, B], C, 0.7), np_quotient(a, b, c, 0.7)),
    ("train_difference", lambda: call("train_difference", [A, B], C, 0.7), np_train(a, b, c, 0.7)),
    ("ties_sum", lambda: call("ties_sum", [A, B, D], C, k=1.0), np_ties([a, b, d], c, 1.0, False)),
    ("ties_sum", lambda: call("ties_sum", [A, B, D], C, k=0.4), np_ties([a, b, d], c, 0.4, False)),
    (
        "ties_sum",
        lambda: call("ties_sum", [A, B, D], C, k=0.6, vote="count"),
        np_ties([a, b, d], c, 0.6, True),
    ),
    ("ties_sum", lambda: call("ties_sum", [A, B], C, 0.5, k=0.6), (c + np_ties([a, b], c, 0.6, False)) / 2),
    ("dropout", lambda: call("dropout", [A, B], C, 0.5, probability=0.0), c + 0.5 * ((a - c) + (b - c)) / 2),
    ("tensor_sum", lambda: call("tensor_sum", [A, B], weight=0.5), rows_from_b(0, 1)),
    ("tensor_sum", lambda: call("tensor_sum", [A, B], weight=0.5, offset=0.75), rows_from_b(3, 0)),
    ("top_k_tensor_sum", lambda: call("top_k_tensor_sum", [A, B], weight=1.0), np_top_k(a, b, 1.0, 0.0)),
    (
        "top_k_tensor_sum",
        lambda: call("top_k_tensor_sum", [A, B], weight=0.5, offset=0.25),
        np_top_k(a, b, 0.5, 0.25),
    ),
    (
        "top_k_tensor_sum",
        lambda: call("top_k_tensor_sum", [A, B], weight=0.5, offset=0.75),
        np_top_k(a, b, 0.5, 0.75),
    ),
    ("crossover", lambda: call("crossover", [A, B], weight=0.6), np_crossover(a, b, 0.6, 0)),
    ("crossover", lambda: call("crossover", [A, B], weight=0.6, tilt=0.5), np_crossover(a, b, 0.6, 0.5)),
    (
        "crossover",
        lambda: call("crossover", [A[:, :5], B[:, :5]], weight=0.4),
        np_crossover(a[:, :5], b[:, :5], 0.4, 0),
    ),
    ("crossover", lambda: call("crossover", [A, B], weight=0.3, tilt=1.0), 0.7 * a + 0.3 * b),
    (
        "distribution_crossover",
        lambda: call("distribution_crossover", [A, B], C, 0.6),
        np_distribution(a, b, c, 0.6, 0),
    ),
    (
        "distribution_crossover",
        lambda: call("distribution_crossover", [A, B], C, 0.6, tilt=0.3),
        np_distribution(a, b, c, 0.6, 0.3),
    ),
    ("model_stock", lambda: call("model_stock", [NEAR, CLOSE, A], C), np_stock([near, close, a], c)),
    ("model_stock", lambda: call("model_stock", [A, 2 * C - A], C), c),  # they disagree: the base is left
    ("clip", lambda: call("clip", [A, B, C]), np_clip(a, [b, c], 0)),
    ("clip", lambda: call("clip", [A, B, C, D], stiffness=0.4), np_clip(a, [b, c, d], 0.4)),
    ("uniform_soup", lambda: call("uniform_soup", [A, B, C]), (a + b + c) / 3),
    ("greedy_soup", lambda: call("greedy_soup", [A, B, C], weight=[1, 0, 1]), (a + c) / 2),
    ("ema", lambda: call("ema", [A, B, C], decay=0.8), 0.8 * (0.8 * a + 0.2 * b) + 0.2 * c),
    ("polyak", lambda: call("polyak", [A, B, C], last=2), (b + c) / 2),
    ("polyak", lambda: call("polyak", [A, B, C]), (a + b + c) / 3),
    ("wise_ft", lambda: call("wise_ft", [A, B], weight=0.7), 0.3 * a + 0.7 * b),
]


@pytest.mark.parametrize("case", range(len(GOLDEN)), ids=lambda i: f"{GOLDEN[i][0]}-{i}")
def test_formula(case: int) -> None:
    _, compute, expected = GOLDEN[case]
    before = [t.clone() for t in (A, B, C, D)]
    np.testing.assert_allclose(compute().numpy(), expected, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(t, u) for t, u in zip((A, B, C, D), before, strict=True)), (
        "a method changed its input"
    )


def test_every_method_has_a_golden_test() -> None:
    here = {name for name, _, _ in GOLDEN} | {"fisher", "geometric_median", "rotate"}  # those below
    assert here == set(METHODS)


def test_slerp_of_small_angles_and_of_no_angle() -> None:
    x = torch.tensor([1.0, 0.0])
    for angle in (1e-4, 1e-2, 1.0):  # in float32, where the arc cosine of 1 - 5e-9 is 0
        y = torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32)
        got = call("slerp", [x, y], weight=0.25)
        torch.testing.assert_close(
            got, torch.tensor([np.cos(angle / 4), np.sin(angle / 4)], dtype=torch.float32)
        )
    assert torch.equal(call("slerp", [x, -x], weight=0.25), 0.5 * x)
    assert torch.equal(call("slerp", [x, 0 * x], weight=0.25), 0.75 * x)


def test_powers_where_logarithms_end() -> None:
    x, y, z = torch.tensor([0.0, 1, -2, 0]), torch.tensor([1.0, 0, 3, 0]), torch.tensor([1.0, 1, 0, 0])
    assert call("geometric_sum", [x, y], weight=0.5)[:2].tolist() == [0, 0]
    assert call("multiply_quotient", [x, y], z).isfinite().all()


def test_geometric_median_minimises_the_sum_of_distances() -> None:
    points = [drawn(i, 3) for i in range(5)]
    median = call("geometric_median", points)

    def objective(x: Tensor) -> float:
        return float(sum(torch.linalg.vector_norm(x - p) for p in points))

    for direction in range(20):
        assert objective(median) <= objective(median + 1e-3 * drawn(direction, 3)) + 1e-12
    # Fermat's point of a triangle with sides on a right angle, computed by hand: all angles there are 120 degrees.
    corners = [torch.tensor(p, dtype=torch.float64) for p in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0])]
    fermat = (3 - 3**0.5) / 6
    np.testing.assert_allclose(call("geometric_median", corners).numpy(), [fermat, fermat], atol=1e-6)
    outlier = [torch.zeros(2), torch.zeros(2), torch.full((2,), 1e6)]
    assert call("geometric_median", outlier).abs().max() < 0.1  # their mean is 333,333


def test_fisher_weighs_by_information() -> None:
    f, g = drawn(8, 4, 6).square(), drawn(9, 4, 6).square()
    got = METHODS["fisher"].function(models=[A, B], weights=[0.5, 0.5], companions=[f, g], floor=0.0)
    np.testing.assert_allclose(got.numpy(), ((f * A + g * B) / (f + g)).numpy(), rtol=1e-9)
    weighted = METHODS["fisher"].function(models=[A, B], weights=[0.2, 0.8], companions=[f, g], floor=0.0)
    np.testing.assert_allclose(weighted.numpy(), ((f * A + 4 * g * B) / (f + 4 * g)).numpy(), rtol=1e-9)
    none = METHODS["fisher"].function(models=[A, B], weights=[0.2, 0.8], companions=[0 * f, 0 * g])
    np.testing.assert_allclose(none.numpy(), 0.2 * a + 0.8 * b)


def orthogonal(seed: int, n: int) -> Tensor:
    q = torch.linalg.qr(drawn(seed, n, n)).Q
    q[:, 0] *= torch.linalg.slogdet(q).sign
    return q


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5), (3, 40)])
def test_rotate_finds_a_planted_rotation(shape: tuple[int, int]) -> None:
    x = drawn(5, *shape)
    y = x @ orthogonal(6, shape[1])
    torch.testing.assert_close(call("rotate", [x, y], centralization=0.0), y)
    mean_x, mean_y = x.mean(0), y.mean(0)
    torch.testing.assert_close(call("rotate", [x, y]) - mean_y, y - mean_y)
    torch.testing.assert_close(call("rotate", [x, y], alignment=0.0), x)
    # Half the way twice is the whole way, and a rotation keeps lengths on the way.
    half = call("rotate", [x, y], alignment=0.5, centralization=0.0)
    torch.testing.assert_close(half.norm(), x.norm())
    torch.testing.assert_close(call("rotate", [half, y], alignment=1.0, centralization=0.0), y)
    assert (half - x).norm() < (y - x).norm() and (half - y).norm() < (y - x).norm()
    assert mean_x.shape == mean_y.shape


def test_rotate_is_no_worse_than_any_rotation() -> None:
    x, y = drawn(5, 7, 4), drawn(6, 7, 4)
    best = (call("rotate", [x, y], centralization=0.0) - y).norm()
    for seed in range(20):
        assert best <= (x @ orthogonal(seed, 4) - y).norm() + 1e-12
    based = call("rotate", [x, y], drawn(7, 7, 4), alignment=0.3)
    torch.testing.assert_close(
        based, drawn(7, 7, 4) + call("rotate", [x - drawn(7, 7, 4), y - drawn(7, 7, 4)], alignment=0.3)
    )


def test_dropout_keeps_the_mean_and_drops_the_share() -> None:
    base = torch.zeros(200, 500)
    delta = torch.linspace(0.5, 1.5, base.numel()).reshape(base.shape)
    for options, large, small in (({}, 0.1, 0.1), ({"window": 0.1}, 0.15, 0.05)):
        got = call("dropout", [delta, delta], base, probability=0.9, **options)
        assert abs(got.mean() - 1) < 0.02
        got = call("dropout", [delta], base, probability=0.9, **options)
        kept = got.flatten() != 0
        assert abs(kept[-2000:].float().mean() - large) < 0.02
        assert abs(kept[:2000].float().mean() - small) < 0.02
        assert abs(got.flatten()[-20000:].mean() - delta.flatten()[-20000:].mean()) < 0.05
    raw = call("dropout", [delta], base, rescale=False)
    assert set(torch.unique((raw / delta).round(decimals=4)).tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ties_sum", {"k": 1.5}),
        ("ties_sum", {"vote": "loud"}),
        ("dropout", {"probability": 1.0}),
        ("crossover", {"tilt": 2.0}),
        ("clip", {"stiffness": -1.0}),
        ("tensor_sum", {"offset": 1.5}),
        ("ema", {"decay": 1.0}),
        ("polyak", {"last": 9}),
    ],
)
def test_impossible_options_are_named(name: str, options: dict[str, Any]) -> None:
    method, (option, value) = METHODS[name], next(iter(options.items()))
    states = [{"w": tensor} for tensor in [A, B, D][: None if method.inputs == "N" else 2]]
    with pytest.raises(ConfigError, match=rf"{option} (?:of .* )?is '?{value}"):
        merge(name, states, base={"w": C} if method.takes_base else None, **options)


@pytest.mark.parametrize("kind", [torch.tensor, np.float32, np.array])
def test_options_may_be_scalars_of_torch_and_numpy(kind: Callable[[float], Any]) -> None:
    states, base = [{"w": A}, {"w": B}], {"w": C}
    plain = merge("ties_sum", states, base=base, k=0.25)["w"]
    assert merge("ties_sum", states, base=base, k=kind(0.25))["w"].equal(plain)


def test_what_can_not_be_merged_so_is_told() -> None:
    states = [{"w": A}, {"w": B}]
    with pytest.raises(ConfigError, match=r"A weight is 1e\+39, so large that nothing else would be left"):
        merge("weighted_sum", states, weights=1e39)
    for score, told in (
        (None, "takes a function as score, not None"),
        (lambda state: float("nan"), "is nan, but it"),
    ):
        with pytest.raises(ConfigError, match=told):
            merge("greedy_soup", states, score=score)


def test_the_documentation_has_every_method_as_it_is() -> None:
    page = (
        (Path(__file__).parents[1] / "docs" / "merge_methods.md")
        .read_text(encoding="utf-8")
        .replace("\\|", "|")
    )
    for method in METHODS.values():
        row = next(
            (
                line
                for line in page.splitlines()
                if line.startswith(f"| `{method.name}` | {method.formula} |")
            ),
            "",
        )
        assert row, f"docs/merge_methods.md has another formula for {method.name}"
        for option, value in method.options.items():
            assert f"{option} = {str(value).lower() if isinstance(value, bool) else value}" in row, (
                method.name,
                option,
            )
        assert ("+ base" in row) == method.takes_base and method.reference in row

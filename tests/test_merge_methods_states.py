"""`merge` on whole states: what every method promises, and what no merge may do."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from rebasin.errors import CheckpointError, ConfigError, DataError
from rebasin.merging import METHODS, diagonal_fisher, interpolate, merge
from rebasin.merging.lazy import generator

NAMES = sorted(METHODS)


class Lazy(Mapping[str, Tensor]):
    """A state that gives shapes and dtypes for nothing, and remembers what was read."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors, self.reads = dict(tensors), []

    def __getitem__(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype_of(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    rng = torch.Generator().manual_seed(seed)
    tensors = {
        "conv.weight": draw(4, 3, 3, 3),
        "fc.weight": draw(5, 12),
        "fc.bias": draw(5),
        "scale": draw(),
    }
    tensors |= {"tall.weight": draw(9, 2), "empty": draw(0, 3)}
    whole = {"positions": torch.arange(4), "bn.num_batches_tracked": torch.tensor(seed)}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | whole


def run(name: str, models: list[Any], base: Any = None, **given: Any) -> dict[str, Tensor]:
    """Merge with what the method needs beside the models."""
    method = METHODS[name]
    models = [*models, models[-1]] if method.least > len(models) else models
    if method.takes_base:
        given["base"] = base if base is not None else models[0]
    if "companions" in method.takes:
        given["companions"] = [{k: t.float().abs() + i for k, t in m.items()} for i, m in enumerate(models)]
    if name == "greedy_soup":
        given |= {"score": lambda s: float(s["fc.bias"].float().sum())}
        given.pop("weights", None)
    return dict(merge(name, models, **given))


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_model_with_itself_is_itself_to_the_bit(name: str, dtype: torch.dtype) -> None:
    model = state(1, dtype)
    merged = run(name, [model, {k: t.clone() for k, t in model.items()}])
    assert list(merged) == list(model)
    assert all(same_bits(merged[k], model[k]) for k in model)


@pytest.mark.parametrize(
    "name", ["ties_sum", *(n for n in NAMES if METHODS[n].self_any_base and METHODS[n].takes_base)]
)
def test_a_model_with_itself_is_itself_whatever_the_base(name: str) -> None:
    model, base = state(1), state(2) | {"bn.num_batches_tracked": torch.tensor(1)}
    options = {"k": 1.0} if name == "ties_sum" else {"alignment": 0.4} if name == "rotate" else {}
    merged = run(name, [model, dict(model)], base, **options)
    for k in model:
        torch.testing.assert_close(merged[k], model[k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_functions_themselves_keep_a_model(name: str) -> None:
    """The same without `merge`, which copies equal tensors before any method sees them."""
    method = METHODS[name]
    for key, tensor in state(1, torch.float64).items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        count = max(method.least, 2)
        supply: dict[str, Any] = {
            "models": [tensor.clone() for _ in range(count)],
            "a": tensor,
            "b": tensor.clone(),
        }
        supply |= {
            "base": tensor.clone(),
            "alpha": 0.3,
            "weights": [1 / count] * count,
            "scales": [0.3] * (count - 1),
        }
        supply |= {"companions": [tensor.abs()] * count, "generator": generator(0, key)}
        got = method.function(**{k: supply[k] for k in method.takes})
        torch.testing.assert_close(got, tensor, msg=lambda m, key=key: f"{name} of {key}: {m}")


@pytest.mark.parametrize("name", [n for n in NAMES if METHODS[n].zero or METHODS[n].one])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_weights_0_and_1_reproduce_the_inputs_to_the_bit(name: str, dtype: torch.dtype) -> None:
    method, models, base = METHODS[name], [state(1, dtype), state(2, dtype)], state(3, dtype)
    ends = {"a": models[0], "b": models[1], "base": base}
    expected = []
    if method.zero:
        expected.append((0, method.zero))
    if method.one and name != "greedy_soup":
        expected += (
            [(1, "b"), ([0.0, 2.0], "b"), ([1.0, 0.0], "a")] if method.weight == "weights" else [(1, "b")]
        )
    for weight, end in expected:
        merged = run(name, models, base, weights=weight)
        for key in models[0]:
            assert same_bits(merged[key], ends[end][key]), (weight, key)
            assert all(
                merged[key].data_ptr() != m[key].data_ptr() or m[key].numel() == 0 for m in (*models, base)
            )


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_and_devices_stay_and_integers_too(name: str) -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        models = [
            {k: v / 2 if v.is_floating_point() else v for k, v in state(i, dtype).items()} for i in (1, 2)
        ]
        merged = run(name, models, state(3, dtype))
        for key, tensor in models[0].items():
            assert merged[key].dtype == tensor.dtype and merged[key].shape == tensor.shape
            assert not tensor.is_floating_point() or merged[key].isfinite().all()
        assert torch.equal(merged["positions"], torch.arange(4))
        assert any(not torch.equal(merged[k], models[0][k]) for k in ("fc.weight", "fc.bias")) or name in (
            "greedy_soup",
            "clip",
            "model_stock",
        )


def test_half_precision_is_computed_in_float32() -> None:
    a, b = ({k: v for k, v in state(i).items() if v.is_floating_point()} for i in (1, 2))
    half = [{k: v.half() for k, v in s.items()} for s in (a, b)]
    for name in ("weighted_sum", "slerp", "geometric_sum"):
        exact = merge(name, [{k: v.float() for k, v in s.items()} for s in half], weights=0.3)
        merged = merge(name, half, weights=0.3)
        assert all(torch.equal(merged[k], exact[k].half()) for k in merged)
    wide = merge("weighted_sum", half, dtype=torch.float32)
    assert wide["fc.bias"].dtype == wide.dtype_of("fc.bias") == torch.float32


def test_weighted_sum_is_interpolate() -> None:
    a, b = state(1), state(2) | {"bn.num_batches_tracked": torch.tensor(2)}
    for lam in (0, 0.1, 0.3, 0.5, 0.77, 1, 1.5, -0.5):
        merged, line = merge("weighted_sum", [a, b], weights=lam), interpolate(a, b, lam)
        assert all(same_bits(merged[k], line[k]) for k in line), lam


def test_complex_numbers_are_pairs() -> None:
    a, b = (
        {"z": torch.complex(torch.randn(3, generator=g), torch.randn(3, generator=g))}
        for g in _generators(1, 2)
    )
    merged = merge("weighted_sum", [a, b], weights=0.3)["z"]
    torch.testing.assert_close(merged, 0.7 * a["z"] + 0.3 * b["z"])


def _generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in seeds]


def test_nothing_is_read_before_it_is_asked_for_and_then_once() -> None:
    a, b, base = (Lazy(state(i) | {"bn.num_batches_tracked": torch.tensor(0)}) for i in (1, 2, 3))
    merged = merge("ties_sum", [a, b], base=base)
    assert merged.shape_of("conv.weight") == (4, 3, 3, 3) and merged.dtype_of("positions") == torch.int64
    assert not (a.reads or b.reads or base.reads)
    assert merged["fc.weight"].shape == (5, 12)
    assert a.reads == b.reads == base.reads == ["fc.weight"]
    zero = merge("ties_sum", [a, b], base=base, weights=0)
    assert zero["fc.bias"].shape == (5,) and a.reads == ["fc.weight"], "a model that has no share was read"


def test_random_methods_depend_on_seed_and_name_only() -> None:
    a, b, base = state(1), state(2), state(3)
    first, again = (merge("dropout", [a, b], base=base, seed=7) for _ in range(2))
    forwards = {k: first[k] for k in first}
    backwards = {k: again[k] for k in reversed(list(again))}
    assert all(torch.equal(forwards[k], backwards[k]) for k in forwards)
    other = merge("dropout", [a, b], base=base, seed=8)
    assert not torch.equal(other["fc.weight"], first["fc.weight"])
    # Tensors of one shape have masks of their own, and a process or a machine makes no difference.
    assert generator(0, "x").initial_seed() != generator(0, "y").initial_seed()
    stream = torch.rand(2, generator=generator(3, "fc.weight")).tolist()
    assert stream == pytest.approx([0.8164326548576355, 0.7223605513572693])


def test_progress_counts_every_tensor_once() -> None:
    events: list[dict[str, Any]] = []
    merged = merge("weighted_sum", [state(1), state(1)], progress=events.append)
    assert dict(merged) and merged["fc.bias"] is not None
    total = len(merged)
    assert [e["step"] for e in events] == [*range(1, total + 1), total]
    assert all(e["total"] == total and e["stage"] == "merge" for e in events)


def test_weights_by_name() -> None:
    a, b = state(1), state(2)
    weights = {"fc.weight": 0.0, "fc.bias": 1.0}
    merged = merge("slerp", [a, b], weights=lambda name: weights.get(name, 0.25))
    assert same_bits(merged["fc.weight"], a["fc.weight"]) and same_bits(merged["fc.bias"], b["fc.bias"])
    assert same_bits(merged["conv.weight"], merge("slerp", [a, b], weights=0.25)["conv.weight"])


def broken(name: str, value: float) -> dict[str, Tensor]:
    model = state(2)
    model[name] = model[name].clone()
    model[name].view(-1)[0] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_named(value: float) -> None:
    word = "NaN" if value != value else "infinity"
    with pytest.raises(CheckpointError, match=f"'fc.weight' of B .*{word}"):
        dict(merge("weighted_sum", [state(1), broken("fc.weight", value)]))
    with pytest.raises(CheckpointError, match="'scale' of the base"):
        dict(merge("ties_sum", [state(1), state(2)], base=broken("scale", value)))
    with pytest.raises(CheckpointError, match="'fc.weight' of B"):  # also where its tensor is copied as it is
        merge("weighted_sum", [state(1), broken("fc.weight", value)], weights=1)["fc.weight"]
    mask = {"mask": torch.full((3, 3), value)}
    assert same_bits(merge("slerp", [mask, {"mask": mask["mask"].clone()}])["mask"], mask["mask"])


def test_what_a_dtype_cannot_hold_is_named() -> None:
    a, b = {"w": torch.full((2, 2), 6e4).half()}, {"w": torch.full((2, 2), -6e4).half()}
    with pytest.raises(CheckpointError, match="'w' with 'weighted_sum'.*float16"):
        merge("weighted_sum", [a, b], weights=-1)["w"]


def without(model: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k: v for k, v in model.items() if k != name}


WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("nonsense", {}, ConfigError, "no merge method 'nonsense'; there are .*slerp"),
    ("slerp", {"states": [state(1)]}, ConfigError, "takes 2 models, but got 1"),
    ("slerp", {"states": [state(1)] * 3}, ConfigError, "takes 2 models, but got 3"),
    ("clip", {}, ConfigError, "3 models or more"),
    ("ties_sum", {}, ConfigError, "needs a base"),
    ("slerp", {"base": state(3)}, ConfigError, "no use for a base"),
    ("fisher", {}, ConfigError, "needs a companion"),
    ("slerp", {"companions": [state(1)] * 2}, ConfigError, "no companions"),
    ("slerp", {"tilt": 1}, ConfigError, "no option 'tilt'; it has none"),
    ("crossover", {"titl": 1}, ConfigError, "no option 'titl'; did you mean 'tilt'. It has tilt"),
    ("greedy_soup", {}, ConfigError, "needs the option 'score'"),
    ("slerp", {"weights": [0.1, 0.9]}, ConfigError, "takes one weight"),
    ("slerp", {"weights": float("nan")}, ConfigError, "finite"),
    ("uniform_soup", {"weights": 0.5}, ConfigError, "has no weights"),
    ("weighted_sum", {"weights": [0.1, 0.2, 0.7]}, ConfigError, "2 models but 3 weights"),
    ("weighted_sum", {"weights": [-1.0, 2.0]}, ConfigError, "negative"),
    ("weighted_sum", {"weights": [0.0, 0.0]}, ConfigError, "all be 0"),
    ("weighted_sum", {"states": [state(1)] * 3, "weights": 0.5}, ConfigError, "a list of 3"),
    ("add_difference", {"base": state(3), "weights": [1, 1]}, ConfigError, "1 models after"),
    (
        "slerp",
        {"states": [state(1), without(state(2), "scale")]},
        CheckpointError,
        "'scale' is in A but not in B",
    ),
    (
        "slerp",
        {"states": [without(state(1), "scale"), state(2)]},
        CheckpointError,
        "'scale' is in B but not in A",
    ),
    (
        "ties_sum",
        {"base": without(state(3), "scale")},
        CheckpointError,
        "'scale' is in A but not in the base",
    ),
    (
        "slerp",
        {"states": [state(1), state(2) | {"scale": torch.ones(2)}]},
        CheckpointError,
        r"'scale' has shape \(\)",
    ),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_does_not_fit_is_told_at_once(number: int) -> None:
    name, given, error, sentence = WRONG[number]
    states = given.get("states", [state(1), state(2)])
    with pytest.raises(error, match=sentence):
        merge(name, states, **{k: v for k, v in given.items() if k != "states"})


def test_integers_must_agree() -> None:
    other = state(2) | {"positions": torch.arange(4) + 1}
    with pytest.raises(CheckpointError, match="Integer tensor 'positions' differs between A and B"):
        dict(merge("slerp", [state(1), other]))
    with pytest.raises(CheckpointError, match="'scale' of B is torch.int64"):
        dict(merge("slerp", [state(1), state(2) | {"scale": torch.tensor(1)}]))


def test_greedy_soup_keeps_what_helps() -> None:
    """Models are numbers, their loss is the square: 1 and -1 make 0; 5 makes it worse, wherever it stands."""
    models = [{"w": torch.tensor([x])} for x in (5.0, 1.0, -1.1)]
    calls: list[float] = []

    def score(s: Mapping[str, Tensor]) -> float:
        calls.append(float(s["w"]))
        return float(s["w"]) ** 2

    merged = merge("greedy_soup", models, score=score)
    assert merged.weights == [0.0, 0.5, 0.5] and merged["w"].item() == pytest.approx(-0.05, rel=1e-5)
    assert calls == pytest.approx([5.0, 1.0, -1.1, -0.05, 4.9 / 3], rel=1e-5)
    best = merge("greedy_soup", models, score=score, mode="max")
    assert best.weights == [1.0, 0.0, 0.0]
    with pytest.raises(ConfigError, match="choose one of min, max"):
        merge("greedy_soup", models, score=score, mode="median")


class Straight:
    """An objective with gradients that are known: loss of a sample x is w x, so its gradient by w is x."""

    def loss(self, model: torch.nn.Module, batch: Any) -> Tensor:
        return model(batch["x"]).mean()

    def evaluate(self, model: torch.nn.Module, batches: Any) -> dict[str, float]:
        raise NotImplementedError


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def test_fisher_information_is_the_mean_squared_gradient_of_samples() -> None:
    model, x = Line().train(), torch.tensor([[1.0, 2.0], [3.0, 0.0], [-1.0, 1.0]])
    batches = [{"x": x[:2], "label": "a"}, {"x": x[2:], "label": "b"}]
    got = diagonal_fisher(model, Straight(), batches)
    assert got["w"].tolist() == pytest.approx(x.square().mean(0).tolist())
    assert got["unused"].tolist() == [1, 1, 1] and got["count"].tolist() == [1]
    assert model.training and model.w.grad is None
    one = diagonal_fisher(model, Straight(), batches, max_samples=1)
    assert one["w"].tolist() == [1, 4]
    whole = diagonal_fisher(model, Straight(), batches[:1], per_sample=False)
    assert whole["w"].tolist() == x[:2].mean(0).square().tolist()
    with pytest.raises(DataError, match="not one batch"):
        diagonal_fisher(model, Straight(), [])
    # It is what `merge` wants: the model with the larger gradient wins.
    a, b = {"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}
    merged = merge("fisher", [a, b], companions=[{"w": one["w"]}, {"w": 3 * one["w"]}], floor=0.0)
    assert merged["w"].tolist() == pytest.approx([0.75, 0.75])


@pytest.mark.parametrize("name", NAMES)
def test_the_result_shares_no_memory_with_the_models(name: str) -> None:
    models, base = [state(1), state(2)], state(3)
    options = {"polyak": {"last": 1}, "ties_sum": {"k": 0.0}, "clip": {}}.get(name, {})
    merged = run(name, models, base, **options)
    own = {tensor.data_ptr() for model in (*models, base) for tensor in model.values() if tensor.numel()}
    assert not any(tensor.data_ptr() in own for tensor in merged.values() if tensor.numel())

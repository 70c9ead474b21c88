"""The straight line between two states."""

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from rebasin.errors import CheckpointError, ConfigError
from rebasin.merging import interpolate


class Lazy(Mapping[str, Tensor]):
    """A mapping that makes its tensors when asked, and remembers how often it was asked."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        self.reads: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 3, generator=generator)
    return {
        "weight": weight.to(dtype),
        "running_var": weight.square().mean(0).to(dtype),
        "positions": torch.arange(4),
        "bn.num_batches_tracked": torch.tensor(seed),
    }


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
def test_endpoints_are_reproduced_to_the_bit(dtype):
    a, b = state(1, dtype), state(2, dtype)
    for lam, end in ((0, a), (1.0, b)):
        result = interpolate(a, b, lam)
        assert list(result) == list(a)
        for name, tensor in end.items():
            assert result[name].dtype == tensor.dtype
            assert result[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
            assert result[name].data_ptr() != tensor.data_ptr()


def test_inside_the_line_and_beyond():
    a, b = state(1), state(2)
    for lam in (0.25, 0.5, 0.9, -0.5, 1.5):
        result = interpolate(a, b, lam)
        torch.testing.assert_close(result["weight"], (1 - lam) * a["weight"] + lam * b["weight"])
        torch.testing.assert_close(
            result["running_var"], (1 - lam) * a["running_var"] + lam * b["running_var"]
        )
        assert result["positions"].equal(a["positions"])
        assert result["bn.num_batches_tracked"] == 1  # a counter follows A


def test_half_precision_is_combined_in_float32():
    a = {"w": torch.tensor([2048.0, 6e4], dtype=torch.float16)}
    b = {"w": torch.tensor([2050.0, 6e4], dtype=torch.float16)}
    # In float16 the products at 1/4 would be rounded, and 6e4 + 6e4 overflow.
    assert interpolate(a, b, 0.25)["w"].tolist() == [2048.0, 6e4 // 32 * 32]
    wide = {"w": b["w"].float() + 0.5}
    mixed = interpolate(a, wide, 0.5)["w"]
    assert mixed.dtype == torch.float16
    assert mixed.equal(((a["w"].float() + wide["w"]) / 2).half())


def test_equal_tensors_stay_equal_to_the_bit():
    a = state(3)
    for lam in (0.1, 1 / 3, 0.7):
        assert interpolate(a, dict(a), lam)["weight"].equal(a["weight"])


def test_swapping_the_endpoints_mirrors_the_line():
    a, b = state(1), state(2)
    assert interpolate(a, b, 0.25)["weight"].equal(interpolate(b, a, 0.75)["weight"])


def test_lazy_states_are_read_once_and_left_alone():
    a, b = Lazy(state(1)), Lazy(state(2))
    result = interpolate(a, b, 0.5)
    assert a.reads == b.reads == list(result)
    assert a.tensors["weight"].equal(state(1)["weight"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("weight"), ["'weight'", "in A but not in B"]),
        (lambda s: s.update(extra=torch.zeros(1)), ["'extra'", "in B but not in A"]),
        (lambda s: s.update(weight=torch.zeros(3, 5)), ["'weight'", "(5, 3)", "(3, 5)"]),
        (lambda s: s.update(weight=torch.zeros(5, 3).long()), ["'weight'", "torch.int64"]),
        (lambda s: s.update(positions=torch.zeros(4).long()), ["'positions'", "differs"]),
    ],
)
def test_states_that_do_not_fit_are_named(change, words):
    b = state(2)
    change(b)
    with pytest.raises(CheckpointError) as caught:
        interpolate(state(1), b, 0.5)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("lam", [float("nan"), float("inf")])
def test_lambda_must_be_finite(lam):
    with pytest.raises(ConfigError, match="finite"):
        interpolate(state(1), state(2), lam)

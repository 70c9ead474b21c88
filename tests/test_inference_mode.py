"""Who calls us in `torch.inference_mode`, as ComfyUI does, has the same results as anyone else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rebasin
from rebasin import straight_through
from rebasin.errors import RebasinError
from rebasin.matching import activation_matching, learned_matching, weight_matching


class Casting(nn.Module):
    """A forward pass that writes a cast out, as those of large transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)).float())


def pair() -> tuple[Casting, Casting, list[Tensor]]:
    torch.manual_seed(0)
    return Casting(), Casting(), [torch.randn(32, 5) for _ in range(2)]


def loss(model: Any, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def verified(a: Casting, b: Casting, batches: list[Tensor]) -> Any:
    return rebasin.verify(a, rebasin.trace(a, batches[0]), batches[0], dtype=torch.float64).require().errors


def matched(how: str) -> Callable[..., Any]:
    def call(a: Casting, b: Casting, batches: list[Tensor]) -> Any:
        spec = rebasin.trace(a, batches[0])
        found = {
            "weights": lambda: weight_matching(spec, a.state_dict(), b.state_dict()),
            "activations": lambda: activation_matching(spec, a, b, batches),
            "ste": lambda: straight_through(spec, a, b, loss, batches, steps=3),
        }[how]()
        return found.permutation.apply(b.state_dict())

    return call


def learned(a: Casting, b: Casting, batches: list[Tensor]) -> Any:
    found = learned_matching(rebasin.trace(a, batches[0]), a, b, loss, batches, steps=3)
    return found.alignment.apply(b.state_dict())


READING: dict[str, Callable[..., Any]] = {
    "verify": verified,
    "weights": matched("weights"),
    "activations": matched("activations"),
}
LEARNING: dict[str, Callable[..., Any]] = {"ste": matched("ste"), "learned": learned}


@pytest.mark.parametrize("name", [*READING, *LEARNING])
def test_results_are_those_of_a_call_outside(name: str) -> None:
    call = {**READING, **LEARNING}[name]
    expected = call(*pair())
    ours = pair()
    with torch.inference_mode():
        torch.testing.assert_close(call(*ours), expected)


@pytest.mark.parametrize("name", READING)
def test_so_are_those_of_models_that_were_made_there(name: str) -> None:
    expected = READING[name](*pair())
    with torch.inference_mode():
        ours = pair()
        torch.testing.assert_close(READING[name](*ours), expected)
    torch.testing.assert_close(READING[name](*ours), expected)


@pytest.mark.parametrize("name", LEARNING)
def test_no_gradient_flows_into_them_which_is_told(name: str) -> None:
    with torch.inference_mode():
        ours = pair()
    with pytest.raises(RebasinError, match="[Ii]nference"):
        LEARNING[name](*ours)

"""What is given by mistake is told in one sentence, whatever function it is given to: devices, states, objectives."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rebasin
from rebasin import matching, merging
from rebasin.data import classification
from rebasin.errors import RebasinError
from rebasin.evaluation import barrier
from rebasin.evaluation.many import compare
from rebasin.matching import (
    activation_alignment,
    activation_and_weight,
    activation_matching,
    activation_then_weight,
    weight_matching,
)
from rebasin.merging import diagonal_fisher, interpolate, merge
from rebasin.merging.least_squares import repair_least_squares
from rebasin.merging.repair import repair, reset_statistics
from rebasin.merging.repair_closed_form import repair_closed_form
from rebasin.merging.zipit import repair_zipit
from rebasin.models.cache import trained
from rebasin.objectives import CrossEntropy, checked
from rebasin.objectives.base import mean_over_batches
from rebasin.search.evaluator import Evaluator
from rebasin.tensors import save_safetensors
from rebasin.tensors.modules import loaded

LONGEST = 300


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


torch.manual_seed(0)
A, B = Net().eval(), Net().eval()
BATCHES = [(torch.randn(8, 4), torch.randn(8, 3)) for _ in range(3)]
SPEC = rebasin.trace(A, torch.randn(2, 4))


def error_of(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def works_or_tells(job: Callable[[], Any]) -> str:
    """The sentence, or "" where it works."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            job()
        except RebasinError as error:
            text = str(error)
            assert text.endswith(".") and "\n" not in text and len(text) <= LONGEST, text
            return text
    return ""


# ------------------------------------------------------------------------------------------------------------ states


def _odd(weight: Tensor) -> dict[str, Any]:
    return {
        "None": None, "a list": weight.tolist(), "numpy": weight.numpy(), "a dict": {"version": 1},
        "sparse": weight.to_sparse(), "csr": weight.to_sparse_csr(), "meta": weight.to("meta"),
        "lazy": nn.LazyLinear(6).weight, "quantised": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "cut": weight[:3], "a number": torch.tensor(1.0), "not finite": weight * float("nan"),
        "fp8": weight.to(torch.float8_e4m3fn), "whole numbers": weight.int(),
    }  # fmt: skip


def bad_states() -> dict[str, Any]:
    good = V
    found: dict[str, Any] = {name: {**good, "a.weight": odd} for name, odd in _odd(good["a.weight"]).items()}
    more = _odd(good["a.weight"])
    found |= {f"more: {name}": {**good, "_extra_state": more[name]} for name in ("None", "a dict", "sparse")}
    found["a number as a name"] = {**good, 3: good["a.weight"]}
    found["a part"] = {name: tensor for name, tensor in good.items() if name != "a.weight"}
    found |= {
        "nothing": {},
        "no state": None,
        "a model": B,
        "a path": "b.safetensors",
        "pairs": [*good.items()],
    }
    return found | {"a state in a state": {"state_dict": good}}


W, V = A.state_dict(), B.state_dict()
ON_STATES: dict[str, Callable[[Any], Any]] = {
    "weight_matching": lambda s: weight_matching(SPEC, W, s),
    "weight_matching, A": lambda s: weight_matching(SPEC, s, W),
    "naive": lambda s: matching.naive(SPEC, W, s),
    "exchange_losses": lambda s: matching.exchange_losses(SPEC, W, s, SPEC.identity()),
    "interpolate": lambda s: interpolate(W, s, 0.5),
    "interpolate, A": lambda s: interpolate(s, W, 0.5),
    "merge": lambda s: dict(merge("weighted_sum", [W, s])),
    "merge, A": lambda s: dict(merge("slerp", [s, W])),
    "merge, base": lambda s: dict(merge("add_difference", [W, W], base=s)),
    "merge, companion": lambda s: dict(merge("fisher", [W, V], companions=[W, s])),
    "barrier": lambda s: barrier(A, W, s, lambda model: float(error_of(model, BATCHES[0]))),
    "apply": lambda s: SPEC.random(1).apply(s),
    "view": lambda s: dict(SPEC.random(1).view(s)),
    "merge_many": lambda s: rebasin.merge_many(SPEC, [W, s, W]),
    "naive_mean": lambda s: dict(matching.naive_mean(SPEC, [W, s]).merged),
    "match_to_pivot": lambda s: matching.match_to_pivot(SPEC, [s, W]),
    "match_by_tree": lambda s: matching.match_by_tree(SPEC, [W, s, W]),
    "match_cycle_consistently": lambda s: matching.match_cycle_consistently(SPEC, [W, s, W], max_steps=2),
    "match_many_activations": lambda s: matching.match_many_activations(SPEC, [W, s], A, BATCHES),
    "match_by_maps": lambda s: matching.match_by_maps(SPEC, [W, s], by="weights"),
    "straight_through_many": lambda s: matching.straight_through_many(
        SPEC, [W, s], A, error_of, BATCHES, steps=1
    ),
    "repair": lambda s: repair(SPEC, A, W, [W, s], BATCHES),
    "repair, merge": lambda s: repair(SPEC, A, s, [W, W], BATCHES),
    "repair_closed_form": lambda s: repair_closed_form(SPEC, A, W, [W, s], BATCHES),
    "repair_least_squares": lambda s: repair_least_squares(SPEC, A, W, [W, s], BATCHES),
    "repair_zipit": lambda s: repair_zipit(SPEC, A, W, [W, s], BATCHES),
    "reset_statistics": lambda s: reset_statistics(A, s, BATCHES),
    "compare": lambda s: compare(A, error_of, BATCHES, [W, s], {"merge": W}),
}


@pytest.mark.parametrize("name", ON_STATES)
def test_a_state_that_is_none_works_or_is_told(name: str) -> None:
    for kind, state in bad_states().items():
        told = works_or_tells(lambda state=state: ON_STATES[name](state))
        if kind in ("a model", "a path", "pairs"):
            assert "a state is wanted" in told or "There is no file b.safetensors" in told, kind


@pytest.mark.parametrize("kind", bad_states())
def test_what_can_not_be_saved_is_told_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    told = works_or_tells(lambda: save_safetensors(tmp_path / "x.safetensors", bad_states()[kind]))
    assert [path.name for path in tmp_path.iterdir()] == ([] if told else ["x.safetensors"])


class Versioned(Net):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("it stays the model's own")


def test_extra_state_of_a_model_stays_its_own() -> None:
    model = Versioned().eval()
    tensors = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    assert torch.equal(loaded(model, tensors).state_dict()["a.weight"], tensors["a.weight"])
    spec = rebasin.trace(model, torch.randn(2, 4))
    assert rebasin.verify(model, spec, torch.randn(2, 4)).passed
    assert barrier(model, tensors, tensors, lambda m: float(error_of(m, BATCHES[0])), points=2).barrier == 0
    assert weight_matching(spec, model.state_dict(), model.state_dict()).moved == 0


# ------------------------------------------------------------------------------------------------------- objectives


class Own:
    """An objective of a user's own."""

    def __init__(self, loss: Any = error_of, figures: Any = None) -> None:
        self._loss, self._figures = loss, figures

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return self._loss(model, batch)

    def evaluate(self, model: nn.Module, batches: Any) -> Any:
        if self._figures is not None:
            return self._figures(0.5)
        with torch.no_grad():
            return float(torch.stack([error_of(model, batch) for batch in batches]).mean())


class LossOnly:
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return error_of(model, batch)


GOOD = {
    "a function": error_of,
    "a lambda": lambda model, batch: error_of(model, batch),
    "a loss alone": LossOnly(),
    "a float": Own(),
    "a tensor": Own(figures=torch.tensor),
    "a mapping": Own(figures=lambda loss: {"loss": torch.tensor(loss), "accuracy": 1}),
}
FIGURES = {
    "true": lambda loss: True, "None": lambda loss: None, "text": str, "several": lambda loss: torch.ones(3),
    "a list": lambda loss: [loss], "no loss": lambda loss: {"accuracy": loss},
    "None in it": lambda loss: {"loss": None},
}  # fmt: skip
LOSSES = {
    "None": lambda model, batch: None, "true": lambda model, batch: True,
    "several": lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1),
    "a mapping": lambda model, batch: {"loss": error_of(model, batch)},
    "too few arguments": lambda model: error_of(model, BATCHES[0]),
}  # fmt: skip
NO_GRADIENT = {
    "a float": lambda model, batch: error_of(model, batch).item(), "a number": lambda model, batch: 3,
    "detached": lambda model, batch: error_of(model, batch).detach(),
}  # fmt: skip
NONE = {"None": None, "text": "loss", "a class": Own, "a loss of torch": nn.MSELoss()}
WITH_LOSS: dict[str, Callable[[Any], Any]] = {
    "straight_through": lambda o: rebasin.straight_through(
        SPEC, A, B, o, BATCHES, steps=1, init="identity", refine=1
    ),
    "straight_through_many": lambda o: matching.straight_through_many(SPEC, [W, V], A, o, BATCHES, steps=1),
    "sinkhorn_matching": lambda o: matching.sinkhorn_matching(SPEC, A, B, o, BATCHES, steps=1),
    "diagonal_fisher": lambda o: diagonal_fisher(A, o, BATCHES, per_sample=False),
}
SEARCHES = ("straight_through", "straight_through_many", "sinkhorn_matching")
EVALUATED = {name: WITH_LOSS[name] for name in SEARCHES} | {
    "compare": lambda o: compare(A, o, BATCHES, [W], {"merge": W})
}


@pytest.mark.parametrize("name", [*WITH_LOSS, "compare"])
def test_objectives_of_users_own(name: str) -> None:
    use = (WITH_LOSS | EVALUATED)[name]
    for objective in GOOD.values():
        assert not works_or_tells(lambda objective=objective: use(objective))
    for kind, objective in NONE.items():
        told = works_or_tells(lambda objective=objective: use(objective))
        assert told.startswith("objective is ") and "(model, batch) -> loss" in told, kind
    if name in EVALUATED:
        for kind, figures in FIGURES.items():
            told = works_or_tells(lambda figures=figures: use(Own(figures=figures)))
            assert "evaluate" in told and "number" in told, kind
        assert name == "compare" or "finite" in works_or_tells(
            lambda: use(Own(figures=lambda loss: float("nan")))
        )
    if name in WITH_LOSS:
        for kind, loss in LOSSES.items():
            assert works_or_tells(lambda loss=loss: use(loss)), kind
        for loss in NO_GRADIENT.values():
            assert "has no gradient" in works_or_tells(lambda loss=loss: use(Own(loss)))


def test_a_function_gives_what_its_object_gives() -> None:
    class Object(LossOnly):
        def evaluate(self, model: nn.Module, batches: Any) -> dict[str, float]:
            return mean_over_batches(model, batches, lambda m, b: ({"loss": error_of(m, b)}, len(b[0])))

    whole, plain = (
        rebasin.straight_through(SPEC, A, B, objective, BATCHES, steps=3, refine=1)
        for objective in (Object(), error_of)
    )
    assert whole.permutation == plain.permutation and whole.objective == plain.objective
    assert checked(checked(error_of)).given is error_of and checked(CrossEntropy()) == CrossEntropy()


# ---------------------------------------------------------------------------------------------------------- devices

ABSENT = "cuda:99"
PAIR: tuple[Any, ...] = SPEC, A, B, BATCHES
ON_DEVICE: dict[str, Callable[[], Any]] = {
    "weight_matching": lambda: weight_matching(SPEC, W, W, device=ABSENT),
    "exchange_losses": lambda: matching.exchange_losses(SPEC, W, W, SPEC.identity(), device=ABSENT),
    "activation_alignment": lambda: activation_alignment(*PAIR, device=ABSENT),
    "activation_matching": lambda: activation_matching(*PAIR, device=ABSENT),
    "activation_and_weight": lambda: activation_and_weight(*PAIR, device=ABSENT),
    "activation_then_weight": lambda: activation_then_weight(*PAIR, device=ABSENT),
    "learned_matching": lambda: rebasin.learned_matching(SPEC, A, B, error_of, BATCHES, device=ABSENT),
    "match_many_activations": lambda: matching.match_many_activations(
        SPEC, [W, W], A, BATCHES, device=ABSENT
    ),
    "auto_matching": lambda: rebasin.auto_matching(SPEC, A, B, error_of, BATCHES, device=ABSENT),
    "auto_alignment": lambda: matching.auto_alignment(SPEC, A, B, error_of, BATCHES, device=ABSENT),
    "straight_through": lambda: rebasin.straight_through(SPEC, A, B, error_of, BATCHES, device=ABSENT),
    "sinkhorn_matching": lambda: matching.sinkhorn_matching(SPEC, A, B, error_of, BATCHES, device=ABSENT),
    "straight_through_many": lambda: matching.straight_through_many(
        SPEC, [W], A, error_of, BATCHES, device=ABSENT
    ),
    "match_by_maps": lambda: matching.match_by_maps(SPEC, [W, V], A, error_of, BATCHES, device=ABSENT),
    "merge": lambda: merge("weighted_sum", [W, W], device=ABSENT),
    "repair": lambda: repair(SPEC, A, W, [W, W], BATCHES, device=ABSENT),
    "repair_closed_form": lambda: repair_closed_form(SPEC, A, W, [W, W], BATCHES, device=ABSENT),
    "repair_least_squares": lambda: repair_least_squares(SPEC, A, W, [W, W], BATCHES, device=ABSENT),
    "repair_zipit": lambda: repair_zipit(SPEC, A, W, [W, W], BATCHES, device=ABSENT),
    "reset_statistics": lambda: reset_statistics(A, W, BATCHES, device=ABSENT),
    "trained": lambda: trained("mlp", classification.load("digits"), device=ABSENT),
    "Evaluator": lambda: Evaluator(A, [W, W], device=ABSENT),
}


@pytest.mark.parametrize("name", ON_DEVICE)
def test_a_device_that_is_not_there_is_told(name: str) -> None:
    assert (
        works_or_tells(ON_DEVICE[name])
        == "device is 'cuda:99', but torch finds no such device; leave it out."
    )


def test_every_public_function_with_a_device_is_tried() -> None:
    for room in (rebasin, matching, merging):
        for name in room.__all__:
            function = getattr(room, name)
            if inspect.isfunction(function) and "device" in inspect.signature(function).parameters:
                assert name in ON_DEVICE or name in ("activation_statistics", "prompt_activation_matching"), (
                    name
                )

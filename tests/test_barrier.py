"""The barrier: its arithmetic, and that measuring leaves no trace."""

import math

import pytest
import torch
from torch import nn

from rebasin.errors import CheckpointError, ConfigError
from rebasin.evaluation import Curve, barrier

# Git Re-Basin, ImageNet ResNet50: published losses and top-1 accuracies (%) of A, the midpoint and B.
LOSS_A, LOSS_B, LOSS_MATCHED, LOSS_NAIVE = 0.957, 0.964, 2.315, 7.144
TOP1_A, TOP1_B, TOP1_MATCHED, TOP1_NAIVE = 76.19, 75.86, 51.01, 0.15


def quadratic(model: nn.Module) -> float:
    """A loss whose curve is known: the squared distance of the weight from 1."""
    return float((model.weight.detach() - 1).square().sum())  # pyright: ignore


def line(weight: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((1, 1), float(weight)), "bias": torch.zeros(1)}


def test_published_curve():
    matched = Curve.measured(
        [0, 0.5, 1], [LOSS_A, LOSS_MATCHED, LOSS_B], {"accuracy": [TOP1_A, TOP1_MATCHED, TOP1_B]}
    )
    naive = Curve.measured(
        [0, 0.5, 1], [LOSS_A, LOSS_NAIVE, LOSS_B], {"accuracy": [TOP1_A, TOP1_NAIVE, TOP1_B]}
    )
    assert matched.barrier == pytest.approx(1.354, abs=1e-3)
    assert naive.barrier == pytest.approx(6.184, abs=1e-3)
    assert matched.drop("accuracy") == pytest.approx(25.0, abs=0.05)
    assert naive.drop("accuracy") == pytest.approx(75.9, abs=0.05)
    assert 1 - matched.drop("accuracy") / naive.drop("accuracy") == pytest.approx(0.67, abs=0.005)
    # At the midpoint the line between the endpoints is their mean.
    assert matched.barrier == pytest.approx(matched.barrier_mean)


def test_the_two_definitions_differ_for_unequal_endpoints():
    curve = Curve.measured([0, 0.25, 0.5, 1], [1.0, 3.0, 3.5, 5.0])
    assert curve.barrier == 1.0  # at 0.25 the line is at 2, at 0.5 at 3
    assert curve.argmax == 0.25
    assert curve.barrier_mean == 2.0  # 5 against 3
    assert curve.at(0.5) == 3.5


def test_a_convex_curve_has_no_barrier_and_nothing_is_clipped():
    curve = Curve.measured([0, 0.5, 1], [0.2, -0.3, 0.2])
    assert curve.losses == (0.2, -0.3, 0.2)
    assert (curve.barrier, curve.argmax) == (0, 0)
    assert curve.barrier_mean == pytest.approx(0)


def test_losses_that_are_not_finite_are_reported():
    curve = Curve.measured([0, 0.5, 1], [1.0, math.nan, 1.0])
    assert math.isnan(curve.barrier)
    assert math.isnan(curve.barrier_mean)
    assert curve.argmax == 0.5
    assert Curve.measured([0, 0.5, 1], [1.0, math.inf, 1.0]).barrier == math.inf


@pytest.mark.parametrize(
    ("lambdas", "losses"),
    [([0], [1]), ([0, 0.5], [1, 1]), ([0.1, 1], [1, 1]), ([0, 1, 1], [1, 1, 1]), ([0, 1], [1])],
)
def test_curves_without_their_ends_are_refused(lambdas, losses):
    with pytest.raises(ConfigError):
        Curve.measured(lambdas, losses)


def test_unknown_metric():
    with pytest.raises(ConfigError, match=r"'top5'.*accuracy"):
        Curve.measured([0, 1], [1, 1], {"accuracy": [1, 1]}).drop("top5")


@pytest.mark.parametrize("points", [2, 4, 25])
def test_every_point_is_the_interpolated_model(points):
    curve = barrier(nn.Linear(1, 1), line(-1), line(2), quadratic, points=points)
    assert curve.lambdas == tuple(i / (points - 1) for i in range(points))
    expected = [(-1 + 3 * lam - 1) ** 2 for lam in curve.lambdas]
    assert curve.losses == pytest.approx(expected, abs=1e-6)
    assert (curve.losses[0], curve.losses[-1]) == (4.0, 1.0)
    assert curve.barrier == 0  # the loss is convex


def test_figures_beside_the_loss_and_progress():
    events = []
    curve = barrier(
        nn.Linear(1, 1),
        line(-1),
        line(1),
        lambda model: {"loss": quadratic(model), "accuracy": 0.5},
        points=3,
        progress=events.append,
    )
    assert curve.metrics == {"accuracy": (0.5, 0.5, 0.5)}
    assert [(e["stage"], e["step"], e["total"], e["lam"], e["loss"]) for e in events] == [
        ("barrier", 1, 3, 0.0, 4.0),
        ("barrier", 2, 3, 0.5, 1.0),
        ("barrier", 3, 3, 1.0, 0.0),
    ]
    assert all(event["seconds"] >= 0 for event in events)


class Tied(nn.Module):
    """A BatchNorm between two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def random_state(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.rand(value.shape, generator=generator)
        if value.is_floating_point()
        else torch.tensor(seed)
        for name, value in model.state_dict().items()
    }
    state["last.weight"] = state["first.weight"]
    return state


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = Tied()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    addresses = {name: value.data_ptr() for name, value in model.state_dict().items()}
    x = torch.randn(8, 4)

    def careless(model: nn.Module) -> float:
        model.train()  # moves the running statistics and leaves the wrong flag behind
        if fails:
            raise RuntimeError("out of order")
        return float(model(x).detach().square().mean())

    a, b = random_state(model, 1), random_state(model, 2)
    if fails:
        with pytest.raises(RuntimeError, match="out of order"):
            barrier(model, a, b, careless, points=3)
    else:
        barrier(model, a, b, careless, points=3)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == addresses
    assert model.training
    assert not model.norm.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert a["norm.running_mean"].equal(random_state(model, 1)["norm.running_mean"])


def test_batchnorm_statistics_go_along_and_tied_names_may_be_absent():
    model = Tied()
    seen = []

    def evaluate(model: nn.Module) -> float:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return 0.0

    a, b = random_state(model, 1), random_state(model, 2)
    del a["last.weight"], b["last.weight"]
    barrier(model, a, b, evaluate, points=3)
    torch.testing.assert_close(
        seen[1]["norm.running_mean"], (a["norm.running_mean"] + b["norm.running_mean"]) / 2
    )
    torch.testing.assert_close(seen[1]["last.weight"], (a["first.weight"] + b["first.weight"]) / 2)
    assert [int(s["norm.num_batches_tracked"]) for s in seen] == [1, 1, 2]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda s: s.pop("bias"), "'bias' is not in the endpoints"),
        (lambda s: s.update(more=torch.zeros(1)), "'more' of the endpoints is not in the model"),
        (lambda s: s.update(weight=torch.zeros(1, 2)), "'weight' has shape"),
    ],
)
def test_states_of_another_model_are_refused(change, word):
    a, b = line(0), line(1)
    change(a)
    change(b)
    with pytest.raises(CheckpointError, match=word):
        barrier(nn.Linear(1, 1), a, b, quadratic, points=2)


def test_states_that_differ_are_refused():
    with pytest.raises(CheckpointError, match="'bias' is in A but not in B"):
        barrier(nn.Linear(1, 1), line(0), {"weight": torch.zeros(1, 1)}, quadratic, points=2)


def test_bad_requests():
    with pytest.raises(ConfigError, match="at least 2"):
        barrier(nn.Linear(1, 1), line(0), line(1), quadratic, points=1)
    with pytest.raises(ConfigError, match="'loss'"):
        barrier(nn.Linear(1, 1), line(0), line(1), lambda _: {"accuracy": 1.0}, points=2)
    with pytest.raises(CheckpointError, match="meta"):
        barrier(nn.Linear(1, 1, device="meta"), line(0), line(1), quadratic, points=2)


def test_an_endpoint_may_be_the_models_own_state() -> None:
    """`model.state_dict()` shares memory with the model, which barrier writes to: the curve must not notice."""
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    copy = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loss(m: nn.Module) -> float:
        return sum(float(p.detach().square().sum()) for p in m.parameters())

    expected = barrier(nn.Linear(3, 2), copy, other.state_dict(), loss, points=5)
    for a, b in ((model.state_dict(), other.state_dict()), (other.state_dict(), model.state_dict())):
        got = barrier(model, a, b, loss, points=5)
        losses = got.losses if a["weight"].data_ptr() == model.weight.data_ptr() else got.losses[::-1]
        assert losses == pytest.approx(expected.losses)
        assert all(torch.equal(copy[name], tensor) for name, tensor in model.state_dict().items())
